"""Experts that are too many for memory go from file to file, one at a time, so that a layer is never in memory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from quantize.checkpoint.checkpoint import Checkpoint
from quantize.checkpoint.expert_reader import reads_alone
from quantize.checkpoint.safetensors_writer import RowWriter
from quantize.formats.qtensor import QTensor
from quantize.graph.linears import Linear
from quantize.graph.program import Program, Segment
from quantize.nn.filed_experts import FiledExperts
from quantize.nn.quantized_experts import QuantizedExperts
from quantize.pipeline.block import Block
from quantize.pipeline.memory import trim_heap
from quantize.pipeline.plan import Plan, changed_by
from quantize.quantizers.rtn import RoundToNearest, quantize_on_meta
from quantize.scheme.scheme import Scheme

HELD = 1 << 28  # float32 weights of a layer's experts that are held, if data or passes need them several times


def streamed(checkpoint: Checkpoint, program: Program, segment: Segment, plan: Plan) -> list[Linear]:
    """Return the stacks of experts of a segment that are not held in memory.

    Without data and passes a weight is read once, so that all are. Otherwise small ones are held, as they are read
    several times. Those that are tuned together, that all tokens go through, that lie on a grid, or that are made of
    parts or merged with an adapter while they are read have to be held whole.
    """
    linears, recipe = program.linears(segment), plan.recipe
    stacks = [linear for linear in linears if linear.experts is not None]
    sizes = {name: node.meta["val"].numel() for node, name in program.parameters.items()}
    size = sum(sizes[linear.weight] for linear in stacks)
    touched = changed_by(plan.steps) | {path for step in plan.steps for path in step.online}
    several = plan.calibrates or touched & {*segment.parameters, *(linear.path for linear in linears)}
    if recipe.tune is not None or recipe.calibrate_all_experts or (several and size <= HELD):
        return []
    return [
        linear
        for linear in stacks
        if linear.path in plan.schemes
        and linear.path not in plan.kept
        and reads_alone(checkpoint, linear.weight, linear.experts or 1)
    ]


class ExpertFile:
    """A file of the rounded experts of a block, of which those are there that were put there.

    Args:
        path: the file, which is written anew.
        block: the block, as its experts are rounded; those that it does not hold are written.
        checkpoint: where the block was read.
    """

    def __init__(self, path: Path, block: Block, checkpoint: Checkpoint) -> None:
        self.modules = {linear: described(linear, block, checkpoint) for linear in block.apart}
        self.path, self.device, self.transforms = path, block.device, block.input_transforms
        tensors = {
            f"{x.path}.{name}": t for x, module in self.modules.items() for name, t in module.state_dict().items()
        }
        self.names = tuple(tensors)
        self.writer = RowWriter(path, tensors)
        for name, x in tensors.items():
            if not x.is_meta:  # of an online transform
                self.writer.put(name, 0, x)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.writer.__exit__(kind, error, trace)

    def put(self, linear: Linear, expert: int, weight: QTensor) -> None:
        """Write the weight of one expert, and the bias that undoes a shift of its input."""
        bias = self.transforms[linear].bias(weight.dequantize(), None) if self.transforms[linear].has_shift else None
        tensors = weight.cat_rows([weight.tensors()]).tensors() | ({} if bias is None else {"bias": bias})
        for name, rows in tensors.items():
            self.writer.put(f"{linear.path}.{name}", expert * self.modules[linear].out_features, rows)

    def filed(self, linear: Linear) -> FiledExperts:
        """Return what multiplies with the experts of a linear, all of which were put there."""
        self.writer.file.flush()
        made = FiledExperts.of(self.modules[linear], self.path, linear.path)
        made.computes_in = made.computes_in.to(self.device)
        return made


def described(linear: Linear, block: Block, checkpoint: Checkpoint) -> QuantizedExperts:
    """Return experts on the meta device."""
    stack, count, found = checkpoint.on_meta(linear.weight), linear.experts or 1, block.input_transforms[linear]
    args = block.schemes[linear].weights
    weight = quantize_on_meta(linear.as_out_in(stack).shape, block.dtypes[linear.weight], args, count)
    bias: Tensor | None = weight.scale.new_empty(len(weight.data), dtype=torch.float32) if found.has_shift else None
    scheme = Scheme(weights=args, activations=found.activations)
    return QuantizedExperts(weight, bias, scheme, found.online, count, linear.transposed)


def round_plainly(block: Block, checkpoint: Checkpoint, path: Path) -> Mapping[Linear, FiledExperts]:
    """Round the experts that a block does not hold to nearest, into a file."""
    with ExpertFile(path, block, checkpoint) as file:
        for linear in block.apart:
            args, dtype = block.schemes[linear].weights, block.dtypes[linear.weight]
            for expert in range(linear.experts or 1):
                file.put(linear, expert, RoundToNearest().quantize(block.expert(linear, expert), args, None, dtype))
            trim_heap()
        return {linear: file.filed(linear) for linear in block.apart}
