"""All that happens to the input of a linear before the integer product."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quantize.formats.fake_quantize import fake_quantize
from quantize.recipe.scheme import ActivationArgs
from quantize.transforms.online.base import Online


@dataclass(frozen=True)
class InputTransform:
    """Online transforms in order, then how the result is quantized (None: it is not)."""

    online: tuple[Online, ...] = ()
    activations: ActivationArgs | None = None

    def append(self, online: Online) -> InputTransform:
        """With one more transform behind the others."""
        return replace(self, online=(*self.online, online))

    @property
    def has_shift(self) -> bool:
        """Whether the bias has to make up for something."""
        return any(transform.has_shift for transform in self.online)

    @property
    def rotations(self) -> tuple[Online, ...]:
        """The transforms that the weight absorbs."""
        return tuple(transform for transform in self.online if not transform.has_shift)

    def transform(self, x: Tensor) -> Tensor:
        """[..., K] → [..., K] as it reaches the quantizer."""
        for transform in self.online:
            x = transform(x)
        return x

    def rotate(self, x: Tensor) -> Tensor:
        """[..., K] → [..., K] as the weight sees it once the bias has taken the shift back."""
        for transform in self.rotations:
            x = transform(x)
        return x

    def quantized(self, x: Tensor) -> Tensor:
        """[..., K] → [..., K]: `rotate`, with the error that the quantizer makes."""
        rounded = fake_quantize(self.transform(x), self.activations)
        return rounded - self.transform(torch.zeros_like(x[..., :1, :])) if self.has_shift else rounded

    def fold_into_weight(self, W: Tensor, done: int = 0) -> Tensor:
        """W [N, K] behind the transforms from number `done` on, computed in float64, in the dtype of W."""
        wide = W.double()
        for transform in self.online[done:]:
            wide = transform.weight(wide)
        return wide.to(W.dtype)

    def bias(self, W: Tensor, bias: Tensor | None) -> Tensor | None:
        """The output bias [N] that takes the shift back exactly for the weight W [N, K] that is multiplied with."""
        if not self.has_shift:
            return bias
        surplus = self.transform(torch.zeros(W.shape[1], dtype=torch.float64)) @ W.double().T
        return (-surplus if bias is None else bias.double() - surplus).float()
