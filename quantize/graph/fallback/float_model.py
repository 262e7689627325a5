"""A whole float model is run as it is to see what reaches its modules, where no graph tells."""

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
from quantize.errors import QuantizeError
from quantize.graph.export import quiet
from quantize.graph.failure import why_model_fails
from quantize.graph.fallback.stacks import WatchedStack, candidates, standing_in


@dataclass(frozen=True)
class FloatModel:
    """A model in floating point, held whole from its first run on.

    Attributes:
        checkpoint: where its weights come from; the checkpoint is not changed.
        examples: argument of `forward` → an example of it.
        switches: further arguments of `forward`.
    """

    checkpoint: Checkpoint
    examples: dict[str, Tensor]
    switches: dict[str, bool]

    @functools.cached_property
    def module(self) -> nn.Module:
        """The model itself; it may change its own weights as it runs, but not those of a module in memory."""
        model = self.checkpoint.load()
        return model if self.checkpoint.module is None else copy.deepcopy(model)

    @functools.cached_property
    def stacks(self) -> dict[str, bool]:
        """Parameters that the model reads by the products of their experts alone → whether they are [experts, K, N].

        Products tell which axis counts the inputs; stacks that no example reaches are none.
        """
        found = dict[str, bool]()
        if self.checkpoint.is_config_alone or not candidates(self.checkpoint.skeleton()):
            return found
        given = {k: x.clone() if not x.is_meta else torch.zeros_like(x, device="cpu") for k, x in self.examples.items()}
        for transposed in (False, True):
            rest = {n: p for n, p in candidates(self.module).items() if n not in found}
            watched = {name: WatchedStack(p, transposed) for name, p in rest.items()}
            with contextlib.suppress(QuantizeError), standing_in(self.module, watched):
                self.run(given, {})
                found |= {name: transposed for name, x in watched.items() if any(x.rows) and not x.read}
        return {name: found[name] for name in candidates(self.module) if name in found}

    @torch.no_grad()
    def run(self, given: Mapping[str, Tensor], notes: Mapping[str, Callable[[Tensor], None]]) -> None:
        """Run the model, and call `notes[path](input)` with what reaches some of its modules.

        Raises:
            QuantizeError: the model does not run.
        """
        with contextlib.ExitStack() as hooks, quiet():
            for path, note in notes.items():
                hook = functools.partial(noted, note)
                hooks.enter_context(self.module.get_submodule(path).register_forward_pre_hook(hook, with_kwargs=True))
            try:
                self.module(**given, **self.switches)
            except Exception as error:  # code of other authors may raise anything
                raise QuantizeError(why_model_fails(self.module, given, error)) from error


def noted(note: Callable[[Tensor], None], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Return a forward pre-hook that notes a module's first input; a table of positions may be given a number."""
    del module
    given = next(iter((*args, *kwargs.values())), None)
    if isinstance(given, Tensor):
        note(given)


def linear_inputs(model: FloatModel, paths: tuple[str, ...], /, **given: Tensor) -> tuple[Tensor, ...]:
    """Return what reaches some linears in one run of the model, float32 [rows, K] each.

    A linear that runs several times has the rows of all times; one that does not run has no rows. Experts have theirs
    sorted by expert, and behind them comes where those of each end, int64 [experts].
    """
    linears = [path for path in paths if path not in model.stacks]
    sizes = {path: int(model.module.get_submodule(path).in_features) for path in linears}  # type: ignore[arg-type]
    seen = {path: LinearInputRows([torch.empty(0, size)]) for path, size in sizes.items()}
    parameters = {path: model.module.get_parameter(path) for path in paths if path not in seen}
    stacks = {path: WatchedStack(p, model.stacks[path]) for path, p in parameters.items()}
    with standing_in(model.module, stacks):
        model.run(given, {path: rows.add for path, rows in seen.items()})
    found = {path: (torch.cat(rows.parts),) for path, rows in seen.items()}
    return tuple(x for path in paths for x in (found[path] if path in found else stacks[path].sorted_rows()))


@dataclass(frozen=True)
class LinearInputRows:
    """The rows that reach one linear, [rows, K] in parts."""

    parts: list[Tensor]

    def add(self, x: Tensor) -> None:
        """Take in a copy of [..., K], because the model may change it in place afterwards."""
        self.parts.append(x.reshape(-1, x.shape[-1]).clone())


def plain_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Return the modules that are linears and nothing more, by path, in the order in which they are registered."""
    return {path: m for path, m in model.named_modules() if isinstance(m, nn.Linear) and is_plain(m)}


def is_plain(linear: nn.Linear) -> bool:
    """Return whether a linear is nothing more: it has no other `forward`, and its weight is not computed."""
    return type(linear).forward is nn.Linear.forward and "weight" in dict(linear.named_parameters(recurse=False))
