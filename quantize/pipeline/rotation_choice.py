"""Rotations are left out where plain rounding loses clearly less without them.

They spread outliers, and where there are none they make weights harder to round: the uniform weights of a new
`nn.Linear` fill four bits evenly, and rotated they are normal, whose rounding has twice the squared error.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from quantize.calibration.runner import SequentialRunner
from quantize.graph.analysis import origin_of
from quantize.graph.linears import Linear
from quantize.graph.program import Program
from quantize.nn.prefix_tokens import PrefixTokens
from quantize.pipeline.block import Block
from quantize.pipeline.plan import LeftOut, Plan, reading
from quantize.quantizers.rtn import RoundToNearest
from quantize.scheme.scheme import TABLE_SCHEME

# Of the error behind a rotation. Uniform weights have a half. The residual stream of Qwen2.5-Coder has 0.66 at W4A8,
# and loses less rotated all the same, as GPTQ makes more of rotated weights than plain rounding does.
CLEARLY = 0.6


@dataclass
class RotationChoice:
    """The errors of plain rounding in front of and behind the passes of a plan, linear by linear.

    Attributes:
        before, after: the error of each linear as the model has it, and as the passes leave it.
    """

    program: Program
    plan: Plan
    prefix: PrefixTokens
    before: dict[Linear, float] = field(default_factory=dict)
    after: dict[Linear, float] = field(default_factory=dict)

    def compare(self, given: Block, passed: Block, plain: SequentialRunner, runner: SequentialRunner) -> None:
        """Note the errors of one block, in front of which both runners stand: the float model's and behind passes."""
        self.before |= self._errors(given, plain)
        self.after |= self._errors(passed, runner)

    def _errors(self, block: Block, runner: SequentialRunner) -> dict[Linear, float]:
        """Return the median over tokens of ‖Ŵ x̂ - W x‖² / ‖W x‖² for each linear that tokens reach, but experts.

        A mean would be that of the one or two tokens that carry massive activations.
        """
        linears = [x for x, scheme in block.schemes.items() if scheme != TABLE_SCHEME and x.experts is None]
        ahead, state, found = SequentialRunner.of(self.program, runner.values), block.overrides(), dict[Linear, float]()
        for sharing in ahead.advance_to_linears(block.segment, state, linears, finish=False):
            for linear in sharing:
                W, transform = block.weight(linear), block.input_transforms[linear]
                args, dtype = block.schemes[linear].weights, block.dtypes[linear.weight]
                W_hat = RoundToNearest().quantize(W, args, None, dtype).dequantize()
                inputs = (self.prefix.rest(x) for x in ahead.inputs(block.segment, linear, state))
                pairs = ((transform.quantized(x) @ W_hat.T, transform.rotate(x) @ W.T) for x in inputs)
                errors = torch.cat([relative_errors(*pair) for pair in pairs])
                found |= {linear: float(errors.median())} if len(errors) else {}
        return found

    def left_out(self) -> LeftOut:
        """Return the rotations that are to be left out."""
        bases, linears = set[tuple[str, int, int]](), set[str]()
        for step in self.plan.steps:
            if step.judged:
                linears |= {x.path for x in self.before if x.path in step.online and self._harms([x])}
                for basis in step.sites:
                    writers = {edge.parameter for edge in basis.writers}
                    readers = [x for x in self.before if x.weight in reading(basis)]
                    if self._harms([*readers, *(x for x in self.before if x.weight in writers and x not in readers)]):
                        bases.add(origin_of(basis))
                        linears |= {x.path for x in readers}
        return LeftOut(frozenset(bases), frozenset(linears))

    def _harms(self, linears: Sequence[Linear]) -> bool:
        before, after = (sum(found[x] for x in linears) for found in (self.before, self.after))
        return before < CLEARLY * after


def relative_errors(found: Tensor, y: Tensor) -> Tensor:
    """Return ‖found - y‖² / ‖y‖² of each token, [tokens]; both are [..., N]."""
    return ((found - y).square().sum(-1) / y.square().sum(-1).clamp(min=torch.finfo(y.dtype).tiny)).flatten()
