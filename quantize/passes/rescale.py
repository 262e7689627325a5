"""Scale channels for what is rotated afterwards: there energies decide, not maxima."""

from __future__ import annotations

import torch
from torch import Tensor

from quantize.passes.base import PASSES, BasisContext
from quantize.passes.scaling import Scaling, live
from quantize.transforms.fold import Diagonal, Transform


@PASSES.register("rescale")
class Rescale(Scaling):
    """s = argmin ‖X / s‖² ‖W · s‖² = (Σ X_j² / Σ W_j²)^¼ for each channel j (QuIP's rescaling, arXiv 2307.13304).

    A rotation spreads the energy of a row over its channels, so that the steps of a grid are in proportion to its norm,
    and the error of a product to both. A diagonal that a model was scaled with before leaves the result as it is.
    """

    def transform(self, context: BasisContext) -> Transform:
        """T = diag(1/s); a channel that is always zero, or that no weight reads, keeps s = 1."""
        X, W = energies(context)
        return Diagonal(1 / live((X / W) ** 0.25, X, W))


def energies(context: BasisContext) -> tuple[Tensor, Tensor]:
    """Σ X_j² and Σ W_j² of each channel of a basis over the linears that read it, float64 [dim]."""
    X, W = torch.zeros(2, context.basis.dim, dtype=torch.float64)
    for seen, weight, indices, _ in context.readers():
        inputs = None if seen is None else seen.value.double().square().sum(dim=0)
        weights = weight.double().square().sum(dim=0)
        for index in indices:
            X = X if inputs is None else X + inputs[index]
            W = W + weights[index]
    return X, W
