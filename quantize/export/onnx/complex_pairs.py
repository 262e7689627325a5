"""Complex numbers, of which ONNX has none, are pairs of real tensors while a model is traced: Llama 4 rotates by them.

Torch asks an operand that is no tensor, by `__torch_function__`, what an operator on it is. So a model's own code runs
as it is, from `torch.polar` or `torch.view_as_complex` to `torch.view_as_real`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


class ComplexPair:
    """What looks like a complex tensor: `real` and `imag` are real ones of its shape."""

    def __init__(self, real: Tensor, imag: Tensor) -> None:
        self.real, self.imag = torch.broadcast_tensors(real, imag)

    def __mul__(self, other: Any) -> ComplexPair:
        """Multiply by a complex or a real tensor, or a real number."""
        if isinstance(other, ComplexPair):
            a, b, c, d = self.real, self.imag, other.real, other.imag
            return ComplexPair(a * c - b * d, a * d + b * c)
        return ComplexPair(self.real * other, self.imag * other)

    __rmul__ = __mul__

    def __getitem__(self, index: Any) -> ComplexPair:
        """Return a part of it."""
        return ComplexPair(self.real[index], self.imag[index])

    def __getattr__(self, name: str) -> Any:
        """Return the shape or the device of the parts, or a method that does the same to both.

        Raises:
            RuntimeError: it is none that only moves numbers.
        """
        if name in ("shape", "device", "dim", "size"):
            return getattr(self.real, name)
        if name not in MOVES:
            raise RuntimeError(f"`{name}` of a complex-valued input has no form for pairs of real tensors")
        return lambda *args, **kwargs: ComplexPair(
            getattr(self.real, name)(*args, **kwargs), getattr(self.imag, name)(*args, **kwargs)
        )

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Compute what a function of torch computes of pairs, as far as it is known here."""
        del types
        name = str(getattr(function, "__name__", ""))
        if name == "view_as_real":
            return torch.stack([args[0].real, args[0].imag], dim=-1)
        if name in ("mul", "multiply", "__mul__", "__rmul__"):
            first, second = args
            return first * second if isinstance(first, ComplexPair) else second * first
        pair = next(x for x in args if isinstance(x, ComplexPair))  # the first operand of all functions in `MOVES`
        return getattr(pair, name)(*args[1:], **(kwargs or {}))


MOVES = ("unsqueeze", "squeeze", "transpose", "reshape", "view", "expand", "flatten", "repeat", "to", "contiguous")


def polar(magnitude: Tensor, angle: Tensor) -> ComplexPair:
    """Return numbers of a magnitude and an angle in radians, real tensors of one shape."""
    return ComplexPair(magnitude * angle.cos(), magnitude * angle.sin())


def view_as_complex(x: Tensor) -> ComplexPair:
    """Return [...] of the real and imaginary parts x [..., 2]."""
    return ComplexPair(x[..., 0], x[..., 1])


MADE: Mapping[Callable[..., Any], Callable[..., ComplexPair]] = {
    torch.polar: polar,
    torch.view_as_complex: view_as_complex,
    torch.complex: ComplexPair,
}  # functions of torch that make complex tensors
