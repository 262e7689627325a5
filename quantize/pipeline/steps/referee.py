"""Rounding by calibration data is kept where it loses less than plain rounding on rows that it has not seen."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from quantize.calibration.runner import SequentialRunner
from quantize.formats.qtensor import QTensor
from quantize.graph.interpreter import Overrides
from quantize.graph.linears import Linear
from quantize.graph.program import Program
from quantize.nn.prefix_tokens import PrefixTokens
from quantize.pipeline.block import Block
from quantize.pipeline.held_out_runs import HeldOutRuns
from quantize.pipeline.run_figures import short
from quantize.pipeline.steps.expert_rows import ExpertRows
from quantize.quantizers.rtn import RoundToNearest


class Referee:
    """The rows that were held back, on their way through one block, ahead of the run.

    Attributes:
        quantized, float_model: the activations of the quantized and of the float model.
    """

    def __init__(self, program: Program, held_out: HeldOutRuns, prefix: PrefixTokens, judges: bool) -> None:
        """Start where the rows are; a referee that does not judge has no rows."""
        self.program, self.held_out, self.rest = program, held_out, prefix.rest
        self.quantized, self.float_model = (
            SequentialRunner.of(program, runner.values if judges else (), runner.values.directory)
            for runner in (held_out.quantized, held_out.float_model)
        )

    def choose(
        self, part: Sequence[Linear], block: Block, weights: Sequence[QTensor], state: Overrides, reference: Overrides
    ) -> list[QTensor]:
        """Return for each linear the weight given or the one rounded to nearest, whichever is nearer on these rows.

        `state` and `reference` are what the quantized and the float model's block run with. The error is
        Σ ‖Ŵ x - W x'‖² / ‖x'‖² over tokens, where x is the rounded input and x' that of the float model.
        """
        if not self.quantized.values:
            return list(weights)
        found, inputs = block.input_transforms[part[0]], self.quantized.inputs(block.segment, part[0], state)
        expected = self.float_model.inputs(block.segment, part[0], reference)
        pairs = [
            (found.quantized(self.rest(x)), found.rotate(self.rest(y))) for x, y in zip(inputs, expected, strict=True)
        ]
        return [
            self._nearer(linear, linear.path, block, block.weight(linear), weight, pairs)
            for linear, weight in zip(part, weights, strict=True)
        ]

    def choose_expert(
        self, part: Sequence[Linear], block: Block, expert: int, weights: Sequence[QTensor]
    ) -> list[QTensor]:
        """Return what `choose` returns, for the weights [N, K] of one expert of each linear, on its rows."""
        if not self.quantized.values:
            return list(weights)
        rows = ExpertRows(self.program, part[0], self.quantized.values, self.float_model.values)
        pairs, found = list(rows.of(expert, block.input_transforms[part[0]])), list[QTensor]()
        for linear, weight in zip(part, weights, strict=True):
            path, W = f"{linear.path}.{expert}", block.expert(linear, expert)
            found.append(self._nearer(linear, path, block, W, weight, pairs))
        return found

    def _nearer(
        self,
        linear: Linear,
        path: str,
        block: Block,
        W: Tensor,
        weight: QTensor,
        pairs: Sequence[tuple[Tensor, Tensor]],
    ) -> QTensor:
        args, dtype = block.schemes[linear].weights, block.dtypes[linear.weight]
        plain = RoundToNearest().rounded(W, args, dtype, weight.global_scale)
        errors = [sum(error(x, y, weight.dequantize(), W) for x, y in pairs) for weight in (plain, weight)]
        if linear.experts is None:
            self._note(path, errors, sum(relative_size(y, W) for _, y in pairs))
        if errors[1] <= errors[0]:
            return weight
        self.held_out.rounded_plainly.append(path)
        return plain

    def _note(self, path: str, errors: Sequence[float], size: float) -> None:
        """Note the relative errors of plain rounding and of the weight that is chosen."""
        found = {"plain_rounding": errors[0], "quantized": min(errors)}
        self.held_out.figures.linears[path] = {n: short((e / max(size, 1e-300)) ** 0.5) for n, e in found.items()}


def error(x: Tensor, reference: Tensor, W_hat: Tensor, W: Tensor) -> float:
    """Return Σ ‖Ŵ x - W x'‖² / ‖x'‖² over the rows of x and x' [..., K], for Ŵ and W [N, K]."""
    size = reference.square().sum(-1).clamp(min=1e-30)
    return float((((x @ W_hat.T - reference @ W.T).square().sum(-1)) / size).sum())


def relative_size(reference: Tensor, W: Tensor) -> float:
    """Return Σ ‖W x'‖² / ‖x'‖² over the rows of x' [..., K], for W [N, K], to which `error` is relative."""
    size = reference.square().sum(-1).clamp(min=1e-30)
    return float(((reference @ W.T).square().sum(-1) / size).sum())
