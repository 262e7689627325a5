"""Clip activations to the part of each token's range that costs the least."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar

from quantize.calibration.statistics import Rows, Statistic
from quantize.graph.basis import Basis
from quantize.passes.base import PASSES, LinearContext, Pass, input_error
from quantize.transforms.online import InputTransform

RATIOS = tuple(1 - i / 20 for i in range(13))


@PASSES.register("activation_clip")
class ActivationClip(Pass):
    """clip_ratio = argmin ‖(Q(X) - X) Wᵀ‖² for each linear, over 1, 0.95, …, 0.4; of equal ones the largest."""

    needs: ClassVar[type[Statistic] | None] = Rows
    never_after: ClassVar[Mapping[str, str]] = {"noisy_bias": "the bias was searched for the grid before clipping"}

    def transforms_input(self, basis: Basis | None, columns: int) -> bool:
        """Return True, since the pass may clip the input of every linear."""
        del basis, columns
        return True

    def input_transform(self, context: LinearContext) -> InputTransform:
        """Return the input transform with the clip ratio of least error."""
        if context.input_transform.activations is None or context.rows is None:
            return context.input_transform
        rows = context.rows
        input_transforms = [
            replace(
                context.input_transform,
                activations=context.input_transform.activations.model_copy(update={"clip_ratio": ratio}),
            )
            for ratio in RATIOS
        ]
        return min(input_transforms, key=lambda input_transform: input_error(context, rows, input_transform))
