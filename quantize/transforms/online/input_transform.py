"""An input transform is all that happens to the input of a linear before the integer product."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quantize.formats.fake_quantize import fake_quantize
from quantize.scheme.scheme import ActivationArgs
from quantize.transforms.online.base import Online


@dataclass(frozen=True)
class InputTransform:
    """Online transforms in order, and then how the result is quantized; None leaves it in floating point."""

    online: tuple[Online, ...] = ()
    activations: ActivationArgs | None = None

    def append(self, online: Online) -> InputTransform:
        """Return an input transform with one more online transform behind the others."""
        return replace(self, online=(*self.online, online))

    @property
    def has_shift(self) -> bool:
        """Whether one of the transforms shifts the input, which the bias has to make up for."""
        return any(transform.has_shift for transform in self.online)

    @property
    def rotations(self) -> tuple[Online, ...]:
        """The online transforms that the weight absorbs, which are those without a shift."""
        return tuple(transform for transform in self.online if not transform.has_shift)

    def transform(self, x: Tensor) -> Tensor:
        """Return x [..., K] as it reaches the quantizer."""
        for transform in self.online:
            x = transform(x)
        return x

    def rotate(self, x: Tensor) -> Tensor:
        """Return x [..., K] as the weight sees it once the bias has taken the shift back."""
        for transform in self.rotations:
            x = transform(x)
        return x

    def quantized(self, x: Tensor) -> Tensor:
        """Return what `rotate` returns, with the error that the quantizer makes."""
        rounded = fake_quantize(self.transform(x), self.activations)
        return rounded - self.transform(torch.zeros_like(x[..., :1, :])) if self.has_shift else rounded

    def fold_into_weight(self, W: Tensor, done: int = 0) -> Tensor:
        """Return W [N, K] after it absorbs the transforms from number `done` on, in float64 and then in W's dtype."""
        wide = W.double()
        for transform in self.online[done:]:
            wide = transform.weight(wide)
        return wide.to(W.dtype)

    def bias(self, W: Tensor, bias: Tensor | None) -> Tensor | None:
        """Return the output bias [N] that takes the shift back exactly, where W [N, K] is the weight of the product."""
        if not self.has_shift:
            return bias
        surplus = self.transform(torch.zeros_like(W[0], dtype=torch.float64)) @ W.double().T
        return (-surplus if bias is None else bias.double() - surplus).to(W.dtype)
