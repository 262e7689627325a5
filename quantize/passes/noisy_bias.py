"""Add a fixed noisy bias to activations before they are rounded, and take it back in the output bias."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from quantize.calibration.statistics import Rows, Statistic
from quantize.graph.basis import Basis
from quantize.passes.base import PASSES, LinearContext, Pass, input_error
from quantize.transforms.online import InputTransform, Shift


@PASSES.register("noisy_bias")
class NoisyBias(Pass):
    """fq(X) = Q(W) Q(X + N) + B - Q(W) N, N fixed (NoisyQuant, Liu et al. 2022, arXiv 2211.16056, equations 7, 8).

    N = m + n U(-1, 1) for each linear, in units of the inputs' mean quantization step. The mean shift m and the
    amplitude n are searched on one half of a sample of inputs, with 0 among the candidates. They are kept if they lower
    the output error on the other half; otherwise nothing is put in front of the linear.

    Attributes:
        amplitude: the largest n that is searched, in quantization steps; 0 adds no noise.
        steps: the number of amplitudes and shifts that are tried beside 0.
        mean_shift: whether m is searched, too.
    """

    needs: ClassVar[type[Statistic] | None] = Rows
    amplitude: float = Field(2.0, ge=0)
    steps: int = Field(20, ge=1)
    mean_shift: bool = False

    def transforms_input(self, basis: Basis | None, columns: int) -> bool:
        """Return True, since the pass may shift the input of every linear."""
        del basis, columns
        return True

    def input_transform(self, context: LinearContext) -> InputTransform:
        """Return the input transform with a shift, if one helps."""
        if context.input_transform.activations is None or context.rows is None or context.input_transform.has_shift:
            return context.input_transform
        search, held_out = context.rows[::2], context.rows[1::2]
        step = mean_step(search, context.input_transform.activations.num_bits)
        noise = torch.rand(search.shape[1], generator=context.generator) * 2 - 1
        m = torch.zeros_like(noise)
        if self.mean_shift:
            grid = [step * self.amplitude * (2 * i / self.steps - 1) for i in range(self.steps + 1)]
            m = m + self._best(context, search, [m, *(m + value for value in grid)]).mean()
        grid = [step * self.amplitude * i / self.steps for i in range(self.steps + 1)]
        shift = self._best(context, search, [m + n * noise for n in grid])
        input_transform = context.input_transform.append(Shift(shift))
        helps = bool(shift.any()) and input_error(context, held_out, input_transform) < input_error(
            context, held_out, context.input_transform
        )
        return input_transform if helps else context.input_transform

    def _best(self, context: LinearContext, X: Tensor, shifts: list[Tensor]) -> Tensor:
        """Return the shift of least output error, and the first of equals."""
        return min(shifts, key=lambda shift: input_error(context, X, context.input_transform.append(Shift(shift))))


def mean_step(X: Tensor, num_bits: int) -> float:
    """Return the distance of two levels of a symmetric grid, averaged over the grids of the rows of X."""
    return float(X.abs().amax(-1).mean()) / ((1 << (num_bits - 1)) - 1)
