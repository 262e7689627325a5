"""Weights that a module computes of other parameters before each use are replaced by what is computed."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

HOOKS = {WeightNorm: remove_weight_norm, SpectralNorm: remove_spectral_norm}  # the older way to compute weights


def with_plain_weights(model: nn.Module) -> nn.Module:
    """Return a copy of a module whose weights are computed nowhere, as by `weight_norm`; itself if none is.

    A module of transformers needs its own parameters, whose names its class knows, and must not be given.
    """
    if not any(parametrize.is_parametrized(module) or hooks_of(module) for module in model.modules()):
        return model
    computed = {id(x): x.detach().clone() for module in model.modules() for x in vars(module).values() if is_made(x)}
    plain = copy.deepcopy(model, computed).eval()  # in training, some weights are computed of what was computed before
    for module in list(plain.modules()):
        for hook in hooks_of(module):
            HOOKS[type(hook)](module, hook.name)
        if parametrize.is_parametrized(module):
            make_plain(module)
    return plain.train(model.training)


def hooks_of(module: nn.Module) -> list[Any]:
    """Return the hooks of a module that compute a weight before each use."""
    return [hook for hook in module._forward_pre_hooks.values() if type(hook) in HOOKS]


def is_made(value: object) -> bool:
    """Return whether a value is a tensor that other tensors were computed to, which cannot be copied as it is."""
    return isinstance(value, Tensor) and not value.is_leaf


def make_plain(module: nn.Module) -> None:
    """Replace the parametrizations of a module by the weights that they make, in place."""
    weights = {name: getattr(module, name).detach() for name in module.parametrizations}  # type: ignore[union-attr]
    before = parametrize.type_before_parametrizations(module)
    del module.parametrizations
    module.__class__ = before  # the copy shares its class with the original, from which nothing may be removed
    for name, weight in weights.items():
        setattr(module, name, nn.Parameter(weight, requires_grad=False))
