"""Hadamard or dual rotation, whichever suits the activations of each basis."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from quantize.calibration.statistics import Rows, Statistic
from quantize.graph.allowed_transforms import AllowedTransforms
from quantize.passes.base import PASSES, BasisContext, LinearContext
from quantize.passes.rotate import Rotate
from quantize.transforms.adaptive_rotation import adaptive_rotation
from quantize.transforms.fold import Rotation, Transform
from quantize.transforms.online import Dual, InputTransform


@PASSES.register("adaptive_rotation")
class AdaptiveRotation(Rotate):
    """Like `rotate`, but chooses between random Hadamard matrices and dual rotations (LRQ-DiT, arXiv 2508.03485).

    The dual rotation may take the place of the Hadamard matrix on whole bases and online. The Hadamard matrix is always
    taken within heads, and where a norm takes the mean, which a dual rotation does not keep.

    Attributes:
        threshold: the root mean square of the inputs from which the dual rotation is taken, which is 1 in the paper;
            None compares the errors of 4-bit rounding on rows kept back.
    """

    needs: ClassVar[type[Statistic] | None] = Rows
    cross_block: ClassVar[bool] = True
    threshold: float | None = Field(None, gt=0)

    def transform(self, context: BasisContext) -> Transform:
        """Return the rotation that suits the inputs of all linears that read the basis."""
        if context.basis.heads > 1 or AllowedTransforms.ORTHOGONAL not in context.basis.allowed:
            return super().transform(context)
        return adaptive_rotation(context.inputs(), self.threshold, context.generator)

    def input_transform(self, context: LinearContext) -> InputTransform:
        """Return the input transform with the rotation that suits the input, or the part that no weight absorbed."""
        if not self.unreached(context.basis) or context.rows is None:
            return super().input_transform(context)
        found = adaptive_rotation(context.rows, self.threshold, context.generator)
        if isinstance(found, Rotation):
            return super().input_transform(context)
        return context.input_transform.append(Dual(found.first, found.permutation, found.second))
