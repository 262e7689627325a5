"""Fold norm gains into the linears that read them."""

from __future__ import annotations

from typing import ClassVar

from quantize.errors import QuantizeError
from quantize.graph.allowed_transforms import AllowedTransforms
from quantize.graph.basis import Basis
from quantize.passes.base import PASSES, BasisContext, Pass
from quantize.transforms.fold import Diagonal, Transform


@PASSES.register("fold_norms")
class FoldNorms(Pass):
    """T = diag(1/g), which makes each norm's gain g ones (SliceGPT, arXiv 2401.15024, section 3).

    The residual stream admits rotations only after this.
    """

    legal: ClassVar[AllowedTransforms] = AllowedTransforms.DIAGONAL
    folds_gains: ClassVar[bool] = True

    def selects(self, basis: Basis) -> bool:
        """Return whether one gain writes the basis."""
        return basis.gain is not None

    def transform(self, context: BasisContext) -> Transform:
        """Return T = diag(1/g).

        Raises:
            QuantizeError: a gain is zero.
        """
        edge = context.basis.gain
        assert edge is not None
        gain = context.weights[edge.parameter].double()[edge.index[0]] + edge.offset
        if not bool(gain.all()):
            raise QuantizeError(
                f"{edge.parameter} has a gain of zero, which cannot be folded; leave out the pass `fold_norms`"
            )
        return Diagonal(1 / gain)
