"""Rotations learned from activations, so that the rotated channels are flat."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field

from quantize.calibration.statistics import Rows, Statistic
from quantize.fold import Transform
from quantize.graph.group import Group
from quantize.passes.base import PASSES, Site
from quantize.passes.rotate import Rotate
from quantize.rotations.blocks import BlockRotation
from quantize.rotations.learned import Objective, learn_rotation


@PASSES.register("learned_rotation")
class LearnedRotation(Rotate):
    """As `rotate`, each rotation that weights absorb learned from the inputs of the linears that read its basis.

    Attributes:
        objective: `whip` (DartQuant, arXiv 2511.04063) or `kurtosis` (KurTail, arXiv 2503.01483).
        steps: of Adam, from a random Hadamard matrix on.
    """

    needs: ClassVar[type[Statistic] | None] = Rows
    spans: ClassVar[bool] = True
    objective: Objective = "whip"
    steps: int = Field(200, ge=0)

    def transform(self, site: Site) -> Transform:
        """T = diag(R, …), one R for each head; R 1 = 1 where a norm takes the mean."""
        centred = Group.ORTHOGONAL not in site.basis.group
        heads = site.inputs().unflatten(-1, (site.basis.heads, -1)).unbind(dim=1)
        return BlockRotation(
            torch.stack([learn_rotation(X, self.objective, site.generator, self.steps, centred=centred) for X in heads])
        )
