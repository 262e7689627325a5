"""Ctrl-C is answered within a backward pass, which otherwise runs to its end in C++: half a minute in a large model."""

from __future__ import annotations

from torch import Tensor


def interruptible(y: Tensor) -> Tensor:
    """Return y, behind whose gradient Python answers signals: it does so only between two instructions of its own."""
    if y.requires_grad:
        y.register_hook(_instruction)
    return y


def _instruction(gradient: Tensor) -> None:
    del gradient
