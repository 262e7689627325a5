"""Triton runs where the tensors are on a GPU, and the reference runs elsewhere."""

from __future__ import annotations

from importlib.util import find_spec

from torch import Tensor


def runs_on_triton(x: Tensor) -> bool:
    """Return whether a Triton kernel runs an operation on `x`: on NVIDIA and AMD GPUs, if Triton is installed.

    Call it as `engine.runs_on_triton`, so that a test can send tensors on the CPU to Triton's interpreter.
    """
    return x.is_cuda and find_spec("triton") is not None
