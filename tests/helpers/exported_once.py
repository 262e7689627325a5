"""Tests export each kind of model once: no run changes its graph, and a run on a tiny model takes as long again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping

import torch
from torch import nn

from quantize.checkpoint.meta_model import ties_of
from quantize.graph.export import turn_caches_off, untie
from quantize.graph.inputs import Input
from quantize.graph.program import Program

KEPT = 64  # graphs

Export = Callable[[nn.Module, "Mapping[str, Input] | None"], Program]


def exporting_once(export: Export) -> Export:
    """Return `export_program` with a memory of what it has exported."""
    made = OrderedDict[Hashable, Program]()

    def give(skeleton: nn.Module, inputs: Mapping[str, Input] | None = None) -> Program:
        key = key_of(skeleton, inputs)
        if key is None:
            return export(skeleton, inputs)
        if key in made:
            untie(skeleton)
            turn_caches_off(skeleton)
            skeleton.eval().to("meta")
        else:
            made[key] = export(skeleton, inputs)
        made.move_to_end(key)
        while len(made) > KEPT:
            made.popitem(last=False)
        return made[key]

    return give


def key_of(model: nn.Module, inputs: Mapping[str, Input] | None) -> Hashable | None:
    """Return all that a graph depends on, code that a test may have replaced with it; None for a module of a test."""
    modules = dict(model.named_modules())
    own = any("forward" in x.__dict__ or x._forward_hooks or x._forward_pre_hooks for x in modules.values())
    if own or not type(model).__module__.startswith("transformers.models."):
        return None
    code = (torch.export.export, *((path, type(x), type(x).forward) for path, x in modules.items()))
    parameters = tuple((name, x.shape, x.dtype) for name, x in model.named_parameters(remove_duplicate=False))
    buffers = tuple((name, x.shape, x.dtype, numbers(x)) for name, x in model.named_buffers())
    given = None if inputs is None else tuple((name, *described(x)) for name, x in inputs.items())
    return repr(model.config), repr(ties_of(model)), code, parameters, buffers, given


def described(given: Input) -> tuple[Hashable, ...]:
    """Return what a graph depends on of an input."""
    x, sample = given.example, None if given.sample is None else numbers(given.sample)
    return x.shape, x.dtype, str(x.device), given.dynamic, repr(given.free), sample


def numbers(x: torch.Tensor) -> bytes | None:
    """Return the bytes of a tensor; None for one without values."""
    return None if x.is_meta else x.detach().reshape(-1).view(torch.uint8).numpy().tobytes()
