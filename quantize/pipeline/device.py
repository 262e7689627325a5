"""A run computes on one device, which is named by its user."""

from __future__ import annotations

import torch

from quantize.errors import UsageError


def resolve_device(name: str | torch.device) -> torch.device:
    """Return the device of a name such as `cpu`, `cuda` or `cuda:1`; `auto` is the first GPU, or the CPU without one.

    Raises:
        UsageError: torch knows no such device, or the machine has none.
    """
    if name == "auto":
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {name}: torch finds no such device here; give cpu, cuda, cuda:1 or auto") from error
    return device
