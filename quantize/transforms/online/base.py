"""What an online transform is."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Self

from torch import Tensor, nn


class Online(nn.Module):
    """x → x T + n on activations [..., K], T invertible; the weight behind it absorbs T⁻¹, the bias n.

    Buffers that are saved are what `restore` is given back.

    Attributes:
        kind: what artifacts call it.
        has_shift: n is not zero.
    """

    kind: ClassVar[str]
    has_shift: ClassVar[bool] = False

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """[..., K] → [..., K]."""

    @abstractmethod
    def weight(self, W: Tensor) -> Tensor:
        """`W @ T⁻ᵀ`, [N, K] → [N, K]."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Plain data for JSON, with `kind`."""

    @abstractmethod
    def cost(self, columns: int) -> int:
        """Multiply-adds for each token of `columns` = K channels."""

    @classmethod
    def restore(cls, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        """From what `settings` gave, less `kind`, and the saved buffers."""
        return cls(**settings, **tensors)
