"""Parameters that a model's files leave out, since the model computes them from its config, are computed here too."""

from __future__ import annotations

import copy
from collections.abc import Container

import torch
from torch import Tensor, nn


def computed_tensors(model: nn.Module, stored: Container[str]) -> dict[str, Tensor]:
    """Return the parameters that a class of transformers never saves, as its own initialization makes them.

    Marian's sinusoidal positions are such. The class names them in `_keys_to_ignore_on_save`.

    Args:
        model: the model on the meta device.
        stored: the names of the parameters that the files hold.
    """
    never_saved = sorted(getattr(model, "_keys_to_ignore_on_save", None) or ())
    known, found = dict(model.named_parameters()), dict[str, Tensor]()
    for name in (name for name in never_saved if name in known and name not in stored):
        path, _, leaf = name.rpartition(".")
        module = copy.deepcopy(model.get_submodule(path)).to_empty(device="cpu")
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(0)
            model._init_weights(module)  # type: ignore[operator]
        found[name] = module.get_parameter(leaf).detach()
    return found
