"""A run computes, or a loaded model runs, on one device, which is named by its user."""

from __future__ import annotations

import torch
from torch import nn

from quantize.errors import UsageError
from quantize.nn.quantized_weight import QuantizedWeight


def free_memory(device: torch.device) -> int | None:
    """Return the bytes that are free on a GPU; None where nothing is known, as on a CPU."""
    return int(torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else None


def resolve_device(name: str | torch.device) -> torch.device:
    """Return the device of a name such as `cpu`, `cuda` or `cuda:1`; `auto` is the first GPU, or the CPU without one.

    Raises:
        UsageError: torch knows no such device, or the machine has none.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {name}: torch finds no such device here; give cpu, cuda, cuda:1 or auto") from error
    return device


def on_device(model: nn.Module, device: torch.device, dtype: torch.dtype, keep_stored: bool) -> nn.Module:
    """Move a model to a device, one quantized weight after the other.

    Args:
        model: a loaded model.
        device: on a GPU each weight is laid out for the kernels, so that the model compiles before it has run.
        dtype: the dtype in which the model computes.
        keep_stored: leave the weights as they are stored, to be laid out beside that when they are first used.
    """
    for module in (x for x in model.modules() if isinstance(x, QuantizedWeight)):
        module.to(device)
        if device.type != "cpu" and not keep_stored:
            module.lay_out(dtype)
    return model.to(device)
