"""The base class of passes that scale channels, and the error by which they compare scales."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import ClassVar

import torch
from torch import Tensor

from quantize.calibration.statistics import Rows, Statistic
from quantize.formats.fake_quantize import fake_quantize
from quantize.graph.allowed_transforms import AllowedTransforms
from quantize.graph.basis import Basis
from quantize.passes.base import BasisContext, Pass
from quantize.quantizers.base import fake_quantize_weight

AFTER_ROTATION = "the rotation has spread the outliers over all channels, and scales found there bring them back"


class Scaling(Pass):
    """A pass with T = diag(1/s), s > 0, on every basis that linears read."""

    legal: ClassVar[AllowedTransforms] = AllowedTransforms.POSITIVE_DIAGONAL
    needs: ClassVar[type[Statistic] | None] = Rows
    never_after: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("rotate", "adaptive_rotation", "learned_rotation"), AFTER_ROTATION
    )

    def selects(self, basis: Basis) -> bool:
        """Return whether linears read the basis."""
        return not any(edge.vector or edge.dual for edge in basis.readers)


def reach(context: BasisContext) -> tuple[Tensor, Tensor]:
    """Return max|X_j| and max|W_j| of each channel of a basis, float64 [dim]; 0 where no linear reads the channel."""
    X, W = torch.zeros(2, context.basis.dim, dtype=torch.float64, device=context.device)
    for seen, weight, indices, _ in context.readers():
        largest = weight.abs().amax(dim=0).double()
        for index in indices:
            X = X if seen is None else torch.maximum(X, seen.absmax.value[index].double())
            W = torch.maximum(W, largest[index])
    return X, W


def live(s: Tensor, X: Tensor, W: Tensor) -> Tensor:
    """Return `s` for channels that are ever used and 1 for the others."""
    return torch.where((X > 0) & (W > 0), s, torch.ones_like(s))


def joint_error(context: BasisContext, s: Tensor) -> float:
    """Return Σ ‖Q(X / s) Q(W · s)ᵀ - X Wᵀ‖² / ‖X Wᵀ‖² over the quantized linears that read a basis.

    Source: AQAS, arXiv 2311.05161, equation 1.

    Args:
        context: the basis, with `Rows` of the linears' inputs.
        s: what channels are divided by, [dim] > 0.
    """
    total = 0.0
    for seen, W, indices, scheme in context.readers():
        if seen is None or scheme is None:
            continue
        X, columns = seen.value, torch.ones_like(W[0])
        for index in indices:
            columns[index] = s.float()
        target = X @ W.T
        W_hat = fake_quantize_weight(W * columns, scheme.weights)
        found = fake_quantize(X / columns, scheme.activations) @ W_hat.T
        total += float((found - target).square().sum() / target.square().sum().clamp(min=torch.finfo(X.dtype).tiny))
    return total


def best_scale(context: BasisContext, candidates: Iterable[Tensor]) -> Tensor:
    """Return the candidate of least `joint_error`, and the first of equals."""
    return min(candidates, key=lambda s: joint_error(context, s))
