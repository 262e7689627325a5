"""Scale channels by their energies, which decide what rounding costs behind a rotation, where maxima do not."""

from __future__ import annotations

import torch
from torch import Tensor

from quantize.passes.base import PASSES, BasisContext
from quantize.passes.scaling import Scaling, live
from quantize.transforms.fold import Diagonal, Transform


@PASSES.register("rescale")
class Rescale(Scaling):
    """s = argmin ‖X / s‖² ‖W · s‖² = (Σ X_j² / Σ W_j²)^¼ for each channel j (QuIP's rescaling, arXiv 2307.13304).

    A rotation spreads the energy of a row over its channels, so the steps of a grid are in proportion to the row's norm
    and the error of a product is in proportion to both norms. If a model was scaled by a diagonal before, the result is
    the same.
    """

    def transform(self, context: BasisContext) -> Transform:
        """Return T = diag(1/s); a channel that is always zero, or that no weight reads, keeps s = 1."""
        X, W = energies(context)
        return Diagonal(1 / live((X / W) ** 0.25, X, W))


def energies(context: BasisContext) -> tuple[Tensor, Tensor]:
    """Return Σ X_j² and Σ W_j² of each channel of a basis over the linears that read it, float64 [dim]."""
    X, W = torch.zeros(2, context.basis.dim, dtype=torch.float64, device=context.device)
    for seen, weight, indices, _ in context.readers():
        inputs = None if seen is None else seen.value.double().square().sum(dim=0)
        weights = weight.double().square().sum(dim=0)
        for index in indices:
            X = X if inputs is None else X + inputs[index]
            W = W + weights[index]
    return X, W
