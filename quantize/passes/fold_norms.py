"""Fold norm gains into the linears that read them."""

from __future__ import annotations

from typing import ClassVar

from quantize.errors import QuantizeError
from quantize.graph.basis import Basis
from quantize.graph.transform_group import AllowedTransforms
from quantize.passes.base import PASSES, BasisContext, Pass
from quantize.transforms.fold import Diagonal, Transform


@PASSES.register("fold_norms")
class FoldNorms(Pass):
    """Make each norm's gain g ones: T = diag(1/g) (SliceGPT, arXiv 2401.15024, section 3).

    Only then does the residual stream admit rotations.
    """

    legal: ClassVar[AllowedTransforms] = AllowedTransforms.DIAGONAL
    folds_gains: ClassVar[bool] = True

    def selects(self, basis: Basis) -> bool:
        """Bases that one gain writes."""
        return basis.gain is not None

    def transform(self, context: BasisContext) -> Transform:
        """T = diag(1/g).

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
