"""Clip activations to the part of each token's range that costs the least."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar

from quantize.calibration.statistics import Rows, Statistic
from quantize.graph.basis import Basis
from quantize.online import Front
from quantize.passes.base import PASSES, Pass, Place, input_error

RATIOS = tuple(1 - i / 20 for i in range(13))


@PASSES.register("activation_clip")
class ActivationClip(Pass):
    """clip_ratio = argmin ‖(Q(X) - X) Wᵀ‖² for each linear, over 1, 0.95, …, 0.4; equal errors clip less."""

    needs: ClassVar[type[Statistic] | None] = Rows
    never_after: ClassVar[Mapping[str, str]] = {"noisy_bias": "the bias was searched for the grid before clipping"}

    def goes_online(self, basis: Basis | None, columns: int) -> bool:
        """In front of every linear."""
        del basis, columns
        return True

    def front(self, place: Place) -> Front:
        """The same, with the grid clipped."""
        if place.front.activations is None or place.rows is None:
            return place.front
        rows = place.rows
        fronts = [
            replace(place.front, activations=place.front.activations.model_copy(update={"clip_ratio": ratio}))
            for ratio in RATIOS
        ]
        return min(fronts, key=lambda front: input_error(place, rows, front))
