"""Balance inputs and weights, and spread both, in each group of channels in front of a linear."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from pydantic import Field

from quantize.calibration.statistics import Rows, Statistic
from quantize.graph.basis import Basis
from quantize.passes.base import PASSES, LinearContext, Pass
from quantize.passes.rotate import AFTER_SEARCH
from quantize.transforms.online import Blocks, InputTransform
from quantize.transforms.wush import wush

BLOCK = 32  # where a format has no groups of its own


@PASSES.register("wush")
class Wush(Pass):
    """Multiply each group of channels online by the matrix that gives inputs and weights the same second moments.

    It is legal in front of every linear, needs no training, and stores K·b numbers for K inputs in groups of b
    (WUSH, arXiv 2512.00956). Linears that share an input have one transform.

    Attributes:
        block_size: b; None takes the columns that share a scale, 32 if all do. If it does not divide the channels, the
            largest common divisor is taken.
        damping: the part of the mean of the moments that is added to them.
    """

    needs: ClassVar[type[Statistic] | None] = Rows
    never_after: ClassVar[Mapping[str, str]] = AFTER_SEARCH
    block_size: int | None = Field(None, ge=2)
    damping: float = Field(0.01, gt=0)

    def transforms_input(self, basis: Basis | None, columns: int) -> bool:
        """Return that it does."""
        del basis, columns
        return True

    def input_transform(self, context: LinearContext) -> InputTransform:
        """Return the input transform with the matrices; ones if no token has reached the linear."""
        columns = context.weight.shape[1]
        block = math.gcd(columns, self.block_size or context.scheme.weights.group_size or BLOCK)
        if context.rows is None or not len(context.rows):
            one = torch.eye(block, device=context.weight.device)
            return context.input_transform.append(Blocks(one.expand(columns // block, -1, -1)))
        X = context.rows.to(context.weight.device)
        return context.input_transform.append(Blocks(wush(X, context.weights, block, self.damping)))
