"""Scale channels to the least error of weights and activations together."""

from __future__ import annotations

from quantize.passes.base import PASSES, BasisContext
from quantize.passes.scaling import Scaling, best_scale, live, reach
from quantize.transforms.fold import Diagonal, Transform

EXPONENTS = tuple(i / 10 for i in range(11))


@PASSES.register("aqas")
class AQAS(Scaling):
    """s = argmin ‖Q(W · s) Q(X / s) - W X‖² (Lee et al. 2023, arXiv 2311.05161, equation 1).

    The search runs over s_j = max|X_j|^a / max|W_j|^b for a and b in 0, 0.1, …, 1. This family contains SmoothQuant
    (b = 1 - a), AWQ (b = 0, by magnitude) and the identity, so the error on the calibration data is at most theirs.
    """

    def transform(self, context: BasisContext) -> Transform:
        """Return T = diag(1/s)."""
        X, W = reach(context)
        candidates = (live(X**a / W**b, X, W) for a in EXPONENTS for b in EXPONENTS)
        return Diagonal(1 / best_scale(context, candidates))
