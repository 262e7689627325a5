"""Which engine runs: Triton where the tensors are on a GPU, the reference elsewhere."""

from __future__ import annotations

from importlib.util import find_spec

from torch import Tensor


def runs_on_triton(x: Tensor) -> bool:
    """Whether an operation on `x` is a Triton kernel's: on NVIDIA and AMD GPUs, where Triton is installed.

    Call it as `engine.runs_on_triton`, so that a test can send what is on the CPU to Triton's interpreter.
    """
    return x.is_cuda and find_spec("triton") is not None
