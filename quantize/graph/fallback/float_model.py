"""A whole model in floating point, run as it is: what reaches its modules, where no graph tells."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quantize.checkpoint.checkpoint import Checkpoint
from quantize.errors import QuantizeError, reason
from quantize.graph.export import quiet


@dataclass(frozen=True)
class FloatModel:
    """A model in floating point, held whole from its first run on.

    Attributes:
        checkpoint: where its weights come from, which stay as they are.
        examples: argument of forward → an example of it.
        switches: further arguments of forward.
    """

    checkpoint: Checkpoint
    examples: dict[str, Tensor]
    switches: dict[str, bool]

    @functools.cached_property
    def module(self) -> nn.Module:
        """The model itself; it may change its own weights as it runs, but not those of a module in memory."""
        model = self.checkpoint.load()
        return model if self.checkpoint.module is None else copy.deepcopy(model)

    @torch.no_grad()
    def run(self, given: Mapping[str, Tensor], notes: Mapping[str, Callable[[Tensor], None]]) -> None:
        """Run the model, and call `notes[path](input)` for what reaches some of its modules.

        Raises:
            QuantizeError: it does not run.
        """
        with contextlib.ExitStack() as hooks, quiet():
            for path, note in notes.items():
                hook = functools.partial(noted, note)
                hooks.enter_context(self.module.get_submodule(path).register_forward_pre_hook(hook, with_kwargs=True))
            try:
                self.module(**given, **self.switches)
            except Exception as error:  # whatever a stranger's code raises
                raise QuantizeError(refusal(given, error)) from error


def refusal(given: Mapping[str, Tensor], error: Exception) -> str:
    """Why a model does not run, in a sentence."""
    shapes = " and ".join(str(list(tensor.shape)) for tensor in given.values())
    operands = isinstance(error, IndexError | RuntimeError)  # an operator refuses its operands
    hint = "; if that is more than the model has positions, give a smaller --seqlen" if operands else ""
    return f"the model does not run on inputs of shape {shapes} ({reason(error)}){hint}"


def noted(note: Callable[[Tensor], None], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of a module with one input."""
    del module
    note(args[0] if args else kwargs["input"])


def linear_inputs(model: FloatModel, paths: tuple[str, ...], /, **given: Tensor) -> tuple[Tensor, ...]:
    """What reaches some linears in one run of the model: float32 [rows, K] each.

    One that runs several times has the rows of all of them; one that does not run has no rows.
    """
    sizes = [int(model.module.get_submodule(path).in_features) for path in paths]  # type: ignore[arg-type]
    seen = [LinearInputRows([torch.empty(0, size)]) for size in sizes]
    model.run(given, {path: rows.add for path, rows in zip(paths, seen, strict=True)})
    return tuple(torch.cat(rows.parts) for rows in seen)


@dataclass(frozen=True)
class LinearInputRows:
    """What reaches one linear, [rows, K] in parts."""

    parts: list[Tensor]

    def add(self, x: Tensor) -> None:
        """Take in [..., K], a copy, as the model may go on to change it in place."""
        self.parts.append(x.reshape(-1, x.shape[-1]).clone())


def plain_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The modules that are linears and nothing more, by path, in the order they are registered."""
    return {path: m for path, m in model.named_modules() if isinstance(m, nn.Linear) and is_plain(m)}


def is_plain(linear: nn.Linear) -> bool:
    """Whether a linear is nothing more: no other forward, and no weight that is computed."""
    return type(linear).forward is nn.Linear.forward and "weight" in dict(linear.named_parameters(recurse=False))
