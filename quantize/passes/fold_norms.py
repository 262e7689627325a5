"""Fold norm gains into the linears that read them."""

from __future__ import annotations

from typing import ClassVar

from quantize.errors import QuantizeError
from quantize.graph.allowed_transforms import AllowedTransforms
from quantize.graph.basis import Basis
from quantize.passes.base import PASSES, BasisContext, Pass
from quantize.transforms.fold import GainFold, Transform


@PASSES.register("fold_norms")
class FoldNorms(Pass):
    """T = diag(1/g), which makes each norm's gain g ones (SliceGPT, arXiv 2401.15024, section 3).

    The residual stream admits rotations only after this. Where it admits none even then, the plan leaves gains as they
    are (`plan.freeing`). A gain of zero is folded as well: the channel stays dead.
    """

    legal: ClassVar[AllowedTransforms] = AllowedTransforms.DIAGONAL
    folds_gains: ClassVar[bool] = True

    def selects(self, basis: Basis) -> bool:
        """Return whether one gain writes the basis."""
        return basis.gain is not None

    def transform(self, context: BasisContext) -> Transform:
        """Return T = diag(1/g).

        Raises:
            QuantizeError: a gain is zero where a bias is not, which no column of a weight can hold.
        """
        edge = context.basis.gain
        assert edge is not None
        gain = context.weights[edge.parameter].double()[edge.index[0]] + edge.offset
        for other in context.basis.writers if not bool(gain.all()) else ():
            written = context.weights[other.parameter].movedim(other.axis, 0)[other.index[0]]
            if other is not edge and bool(written[gain == 0].any()):
                raise QuantizeError(
                    f"{edge.parameter} has a gain of zero where {other.parameter} is not zero, so it cannot be folded; "
                    "leave out the pass `fold_norms`"
                )
        return GainFold(gain)
