"""Weights that a module computes of other parameters before each use are replaced by what is computed."""

from __future__ import annotations

import copy

from torch import nn
from torch.nn.utils import parametrize


def with_plain_weights(model: nn.Module) -> nn.Module:
    """Return a copy of a module whose weights are computed nowhere, as by `weight_norm`; itself if none is.

    A module of transformers needs its own parameters, whose names its class knows, and must not be given.
    """
    if not any(map(parametrize.is_parametrized, model.modules())):
        return model
    plain = copy.deepcopy(model).eval()  # in training, some weights are computed of what was computed before
    for module in [module for module in plain.modules() if parametrize.is_parametrized(module)]:
        weights = {name: getattr(module, name).detach() for name in module.parametrizations}  # type: ignore[union-attr]
        before = parametrize.type_before_parametrizations(module)
        del module.parametrizations
        module.__class__ = before  # the copy shares its class with the original, from which nothing may be removed
        for name, weight in weights.items():
            setattr(module, name, nn.Parameter(weight, requires_grad=False))
    return plain.train(model.training)
