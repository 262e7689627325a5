"""A shift adds a fixed bias to the input of a linear, which the output bias takes back."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from quantize.transforms.online.base import Online


class Shift(Online):
    """x → x + n with n [K]; the output bias becomes b - n Wᵀ (NoisyQuant, arXiv 2211.16056, equation 8)."""

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
        """Return W, since T is the identity."""
        return W

    def settings(self) -> dict[str, Any]:
        """Return the kind alone; n is saved as a tensor."""
        return {"kind": self.kind}

    def cost(self, columns: int) -> int:
        """Return one operation for each channel, an addition."""
        return columns
