"""Before a run with a quantized cache, the model must quantize keys and values wherever the graph does."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from quantize.errors import UsageError
from quantize.graph.export import forward_switches, quiet
from quantize.graph.inputs import example_inputs
from quantize.graph.program import Program
from quantize.nn.attention import FLOAT
from quantize.nn.kv_cache import attention_nodes

LEAVE_OUT = "leave the table kv_cache out of the recipe"


def attention_count(program: Program) -> int:
    """Return the number of attentions in a graph."""
    return sum(len(attention_nodes(segment.nodes)) for segment in program.segments)


def check_kv_cache(program: Program, skeleton: nn.Module) -> None:
    """Check that the loaded model quantizes keys and values wherever the graph does.

    Args:
        program: the program of the model.
        skeleton: the module that was exported.

    Raises:
        UsageError: there is no graph, or no attention in it, or attention that does not go through transformers.
    """
    if program.export_error:
        raise UsageError(
            f"the model cannot be exported ({program.export_error}), so it is not known where it reads keys and "
            f"values; {LEAVE_OUT}"
        )
    owners = [owner(node, skeleton) for segment in program.segments for node in attention_nodes(segment.nodes)]
    if not owners:
        raise UsageError(
            "the model's graph has no scaled_dot_product_attention, which is where keys and values are quantized; "
            f'give a model that has it (transformers: attn_implementation="{FLOAT}"), or {LEAVE_OUT}'
        )
    reached = users_of_interface(skeleton)
    if others := [found.__name__ for found in owners if found not in reached]:
        raise UsageError(
            f"{others[0]} does not go through transformers' AttentionInterface, which is where a loaded model "
            f"quantizes keys and values; {LEAVE_OUT}"
        )


def owner(node: fx.Node, skeleton: nn.Module) -> type[nn.Module]:
    """Return the class of the module whose forward made a node."""
    return type(skeleton.get_submodule(next(reversed(node.meta["nn_module_stack"].values()))[0]))


def users_of_interface(skeleton: nn.Module) -> set[type[nn.Module]]:
    """Return the classes of modules that call the attention that `set_kv_cache` replaces, found in a run on fakes."""
    found: set[type[nn.Module]] = set()

    def noted(module: nn.Module, *args: Any, **options: Any) -> Any:
        found.add(type(module))
        return AttentionInterface()[FLOAT](module, *args, **options)

    given = {name: made.example for name, made in example_inputs(skeleton).items()}
    with overridden(noted), quiet(), contextlib.suppress(Exception):  # some code needs values
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        inputs = {name: mode.from_tensor(example) for name, example in given.items()}
        with mode:
            skeleton(**inputs, **forward_switches(skeleton))
    return found


@contextlib.contextmanager
def overridden(function: Any) -> Iterator[None]:
    """Make `function` transformers' float attention within the context."""
    ALL_ATTENTION_FUNCTIONS[FLOAT] = function
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS[FLOAT]
