"""The base class of online transforms."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Self

from torch import Tensor, nn


class Online(nn.Module):
    """x → x T + n on activations [..., K], with T invertible. The weight behind it absorbs T⁻¹ and the bias absorbs n.

    `restore` is given the buffers that were saved.

    Attributes:
        kind: the name that artifacts use.
        has_shift: whether n is not zero.
    """

    kind: ClassVar[str]
    has_shift: ClassVar[bool] = False

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """[..., K] → [..., K]."""

    @abstractmethod
    def weight(self, W: Tensor) -> Tensor:
        """Return `W @ T⁻ᵀ`, [N, K] → [N, K]."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Return plain data for JSON, with `kind`."""

    @abstractmethod
    def cost(self, columns: int) -> int:
        """Return the multiply-adds for each token of `columns` = K channels."""

    @classmethod
    def restore(cls, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        """Make the transform again from what `settings` returned, without `kind`, and the saved buffers."""
        return cls(**settings, **tensors)
