"""A fixed bias on the input of a linear, taken back in its output bias."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from quantize.transforms.online.base import Online


class Shift(Online):
    """x → x + n, n [K]; the bias becomes b - n Wᵀ (NoisyQuant, arXiv 2211.16056, equation 8)."""

    kind: ClassVar[str] = "shift"
    has_shift: ClassVar[bool] = True
    n: Tensor

    def __init__(self, n: Tensor) -> None:
        super().__init__()
        self.register_buffer("n", n)

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] → [..., K]."""
        return x + self.n.to(x)

    def weight(self, W: Tensor) -> Tensor:
        """T is the identity."""
        return W

    def settings(self) -> dict[str, Any]:
        """The bias itself is saved as a tensor."""
        return {"kind": self.kind}

    def cost(self, columns: int) -> int:
        """An addition each, counted as one."""
        return columns
