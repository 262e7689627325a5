"""The rounding of all weights of a block is tuned together, by gradient descent on the block's output."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import torch
from torch import Tensor, fx, nn

from quantize.formats import get_format
from quantize.formats.qtensor import QTensor
from quantize.graph.interpreter import Overrides, Values, run_node, run_nodes
from quantize.graph.program import Program, Segment
from quantize.nn.interruptible import interruptible
from quantize.nn.quantized_experts import by_expert
from quantize.nn.quantized_linear import QuantizedLinear
from quantize.pipeline.block import Block, Product
from quantize.pipeline.context import RunContext
from quantize.pipeline.held_out_runs import HeldOutRuns
from quantize.pipeline.rng import derived_generator
from quantize.scheme.scheme import TABLE_SCHEME, TuneArgs
from quantize.transforms.equivalence import floating

CELL = 0.49  # in steps: a weight starts at most this far from its rounded value, so that tuning starts at that value


class STELinear(nn.Module):
    """A quantized linear, or experts, whose values are rounded from learned numbers u, in steps of the format.

    Gradients pass every rounding unchanged (straight-through, Bengio et al. 2013, arXiv 1308.3432). Scales, zero points
    and the bias are not learned.
    """

    def __init__(self, done: Product, W: Tensor) -> None:
        super().__init__()
        self.done, weight = done, done.qtensor()
        scale, z = weight.unpack_scale().float(), weight.zero_point
        self.scale = scale.repeat_interleave(W.shape[1] // scale.shape[1], dim=1)
        wide = torch.zeros_like(scale) if z is None else z.float()
        self.zero_point = wide.repeat_interleave(W.shape[1] // scale.shape[1], dim=1)
        self.number_format = get_format(weight.args.format)
        values, cell = weight.unpack().float(), CELL * self.number_format.step
        start = values + (W / self.scale + self.zero_point - values).clamp(-cell, cell)
        self.u = nn.Parameter(start / self.number_format.step)

    def values(self) -> Tensor:
        """Return values of the format [N, K], with a gradient to u."""
        t = self.u * self.number_format.step
        return straight_through(t, self.number_format.round(t, self.done.scheme.weights))

    def forward(self, x: Tensor, offs: Tensor | None = None) -> Tensor:
        """Map [..., K] to [..., N] in fake quantization, the rows of experts as `QuantizedExperts` does."""
        W = (self.values() - self.zero_point) * self.scale
        if isinstance(self.done, QuantizedLinear):
            return fake_linear(self.done, x, W)
        experts, parts = self.done, W.unflatten(0, (self.done.count, -1))
        return by_expert(x, offs, lambda e, rows: fake_linear(experts.expert(e), rows, parts[e]), experts.out_features)


def fake_linear(done: QuantizedLinear, x: Tensor, W: Tensor) -> Tensor:
    """Multiply x [..., K] as it reaches a quantized linear's product with W [N, K], with gradients to both."""
    return interruptible(nn.functional.linear(straight_through(done.transform(x), done.fake_input(x)), W, done.bias))


def straight_through(x: Tensor, rounded: Tensor) -> Tensor:
    """Return `rounded`, with the gradient of x."""
    return x + (rounded - x).detach()


@dataclass(frozen=True)
class BlockTuner:
    """Tunes blocks whose linears are already rounded.

    Attributes:
        program, context: the program and the context of the run.
        args: the number of steps and the learning rate.
    """

    program: Program
    context: RunContext
    args: TuneArgs

    @torch.enable_grad()
    def apply(self, block: Block, starts: Sequence[Values], targets: Sequence[Mapping[fx.Node, Tensor]]) -> Block:
        """Return the block with new weights on the grids that its quantized linears have.

        This is AutoRound (arXiv 2309.05516), but with Adam on the latent weights. The loss is ‖ŷ - y‖² / ‖y‖² of each
        token of the block's outputs, where ŷ comes from inputs with the error of all earlier blocks, and y from the
        float model.

        Args:
            block: a rounded block that still has the float weights.
            starts: the quantized model's values in front of the block, batch by batch.
            targets: the outputs of the float model's block for the same batches, by node.
        """
        rest = {x: y for x, y in block.quantized.items() if y.scheme == TABLE_SCHEME or x in block.kept}
        made = {x: STELinear(done, block.weight(x)) for x, done in block.quantized.items() if x not in rest}
        if not made:
            return block
        state, segment = block.overrides(), block.segment
        latents = {node: latent for linear, latent in made.items() for node in linear.calls}
        live = replace(state, linears=state.linears | latents)
        adam = torch.optim.Adam([latent.u for latent in made.values()], self.args.learning_rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, self.args.steps)
        generator = derived_generator(self.context.seed, zlib.crc32(segment.name.encode()))
        for batch in islice(shuffled(len(starts), generator), self.args.steps):
            adam.zero_grad()
            self._loss(segment, dict(starts[batch]), targets[batch], live).backward()
            adam.step()
            schedule.step()
        tuned = {x: block.quantize(x, to_qtensor(latent), self.context.prefix) for x, latent in made.items()}
        return replace(block, quantized=tuned | rest)

    @torch.no_grad()
    def keep_nearer(self, rounded: Block, tuned: Block, held_out: HeldOutRuns, reference: Overrides) -> Block:
        """Return the tuned block unless it loses more on the rows held back than the block did before.

        Args:
            rounded, tuned: the block before and after tuning.
            held_out: the rows, in front of the block.
            reference: what the float model's block runs with.
        """
        segment, losses = rounded.segment, [0.0, 0.0]
        for x, y in zip(held_out.quantized.values, held_out.float_model.values, strict=True):
            values = dict(y)
            run_nodes(self.program, segment.nodes, values, reference)
            target = block_outputs(values, segment)
            for number, block in enumerate((rounded, tuned)):
                losses[number] += float(self._loss(segment, dict(x), target, block.overrides()))
        if losses[1] <= losses[0]:
            return tuned
        held_out.not_tuned.append(segment.name)
        return rounded

    def _loss(self, segment: Segment, values: Values, target: Mapping[fx.Node, Tensor], live: Overrides) -> Tensor:
        """Return the loss: a mean over tokens, and a sum over the block's outputs."""
        for node in segment.nodes:
            values[node] = run_node(self.program, node, values, live)
        return torch.stack([relative_error(values[node], y) for node, y in target.items()]).sum()


def shuffled(count: int, generator: torch.Generator) -> Iterator[int]:
    """Yield the numbers below `count` in a random order, again and again."""
    while True:
        yield from torch.randperm(count, generator=generator).tolist()


def relative_error(found: Tensor, y: Tensor) -> Tensor:
    """Return the mean over tokens of ‖found - y‖² / ‖y‖²; both are [..., K]."""
    return ((found - y).square().sum(-1) / y.square().sum(-1).clamp(min=torch.finfo(y.dtype).tiny)).mean()


def block_outputs(values: Values, segment: Segment) -> dict[fx.Node, Tensor]:
    """Return those values alive after a block that the block computed."""
    return {node: value for node, value in values.items() if node in set(segment.nodes) and floating(value)}


@torch.no_grad()
def to_qtensor(linear: STELinear) -> QTensor:
    """Return the tuned values with the scales they had."""
    weight = linear.done.qtensor()
    return QTensor.pack(linear.values(), weight.scale, weight.zero_point, weight.args, weight.global_scale)
