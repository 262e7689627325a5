"""Rotations learned from activations, so that the rotated channels are flat."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from quantize.calibration.statistics import Rows, Statistic
from quantize.graph.allowed_transforms import AllowedTransforms
from quantize.passes.base import PASSES, BasisContext
from quantize.passes.rotate import Rotate
from quantize.transforms.block_rotation import BlockRotation
from quantize.transforms.fold import Transform
from quantize.transforms.learned_rotation import Objective, learn_rotation


@PASSES.register("learned_rotation")
class LearnedRotation(Rotate):
    """Like `rotate`, but whole bases get a rotation that is learned from the inputs of all linears that read them.

    Values within heads get a Hadamard matrix, because another one mixes the heads online afterwards. A rotation learned
    there made values flat before that mixing and not behind it, which cost MiniLM 1 % of its Spearman correlation.

    Attributes:
        objective: `whip` (DartQuant, arXiv 2511.04063) or `kurtosis` (KurTail, arXiv 2503.01483).
        steps: the number of steps of Adam, which starts from a random Hadamard matrix.
    """

    needs: ClassVar[type[Statistic] | None] = Rows
    cross_block: ClassVar[bool] = True
    objective: Objective = "whip"
    steps: int = Field(200, ge=0)

    def transform(self, context: BasisContext) -> Transform:
        """Return T = R, with R 1 = 1 where a norm takes the mean; within heads R is a random Hadamard matrix."""
        if context.basis.heads > 1:
            return super().transform(context)
        centred = AllowedTransforms.ORTHOGONAL not in context.basis.allowed
        return BlockRotation(
            learn_rotation(context.inputs(), self.objective, context.generator, self.steps, centred=centred)
        )
