"""Experts that are rounded without data go from file to file, one at a time, so that a layer is never in memory."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from quantize.checkpoint.checkpoint import Checkpoint
from quantize.checkpoint.expert_reader import read_expert
from quantize.checkpoint.safetensors_writer import RowWriter
from quantize.formats.qtensor import QTensor
from quantize.graph.linears import Linear
from quantize.graph.program import Program, Segment
from quantize.nn.filed_experts import FiledExperts
from quantize.nn.quantized_experts import QuantizedExperts
from quantize.pipeline.context import RunContext
from quantize.pipeline.memory import trim_heap
from quantize.pipeline.plan import Plan, changed_by
from quantize.quantizers.rtn import quantize_on_meta


def streamed(checkpoint: Checkpoint, program: Program, segment: Segment, plan: Plan) -> list[Linear]:
    """Return the stacks of experts of a segment that need not be in memory, as no pass and no data touches it.

    Those that are made of parts or merged with an adapter while they are read have to be read whole.
    """
    linears = program.linears(segment)
    touched = changed_by(plan.steps) | {path for step in plan.steps for path in step.online}
    if plan.calibrates or touched & {*segment.parameters, *(linear.path for linear in linears)}:
        return []
    return [
        linear
        for linear in linears
        if linear.experts is not None
        and linear.path in plan.schemes
        and linear.path not in plan.kept
        and (checkpoint.module is not None or checkpoint.is_config_alone or checkpoint.stored(linear.weight))
    ]


@dataclass(frozen=True)
class ExpertStream:
    """Rounds stacks of experts into a file.

    Attributes:
        checkpoint, plan, context: of the run.
        file: the file, beside that of the block's other tensors.
    """

    checkpoint: Checkpoint
    plan: Plan
    context: RunContext
    file: Path

    def round(self, linears: Iterable[Linear]) -> dict[Linear, FiledExperts]:
        """Round the experts of some linears; what is returned multiplies with what was written."""
        described = {linear: self._on_meta(linear) for linear in linears}
        tensors = {f"{x.path}.{name}": t for x, module in described.items() for name, t in module.state_dict().items()}
        with RowWriter(self.file, tensors) as writer:
            for linear, module in described.items():
                for expert in range(module.count):
                    weight = self._rounded(linear, expert)
                    for name, rows in weight.tensors().items():
                        writer.put(f"{linear.path}.{name}", expert * module.out_features, rows)
                trim_heap()
        filed = {linear: FiledExperts.of(module, self.file, linear.path) for linear, module in described.items()}
        for module in filed.values():
            module.computes_in = module.computes_in.to(self.context.device)
        return filed

    def _on_meta(self, linear: Linear) -> QuantizedExperts:
        stack, scheme = self.checkpoint.on_meta(linear.weight), self.plan.schemes[linear.path]
        dtype, count = self.checkpoint.dtype_of(linear.weight), linear.experts or 1
        weight = quantize_on_meta(linear.as_out_in(stack).shape, dtype, scheme.weights, count)
        return QuantizedExperts(weight, None, scheme, (), count, linear.transposed)

    def _rounded(self, linear: Linear, expert: int) -> QTensor:
        W = read_expert(self.checkpoint, linear.weight, expert, linear.experts or 1).to(self.context.device)
        args, dtype = self.plan.schemes[linear.path].weights, self.checkpoint.dtype_of(linear.weight)
        made = self.plan.quantizer.quantize(W.T if linear.transposed else W, args, None, dtype)
        return made.cat_rows([made.tensors()])
