"""One run on its way through the blocks: each is transformed, quantized and handed out to be written."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from quantize.artifact.quantization_config import linear_settings
from quantize.calibration.data import BATCH_TOKENS, Samples
from quantize.calibration.precision import bfloat16_products, calibrates_in_bfloat16
from quantize.calibration.probes import verification_inputs
from quantize.calibration.runner import SequentialRunner
from quantize.checkpoint.checkpoint import Checkpoint
from quantize.checkpoint.tied_weights import TiedWeights
from quantize.formats.qtensor import QTensor
from quantize.graph.interpreter import Overrides, Values
from quantize.graph.linears import Linear
from quantize.graph.program import Program, Segment
from quantize.nn.kv_cache import check_hadamard, quantized_attention
from quantize.nn.prefix_tokens import PrefixTokens
from quantize.nn.quantized_linear import QuantizedLinear
from quantize.pipeline.distributed import SingleProcess
from quantize.pipeline.memoize import Once, always
from quantize.pipeline.memory import trim_heap
from quantize.pipeline.plan import Plan
from quantize.pipeline.rng import derived_generator
from quantize.pipeline.serialization import contiguous
from quantize.pipeline.steps.global_statistics import collect_global_statistics
from quantize.pipeline.steps.round import WeightRounder
from quantize.pipeline.steps.transform import PassRunner, Surveys, float_state
from quantize.pipeline.steps.tune import BlockTuner, block_outputs
from quantize.recipe.scheme import Scheme, TuneArgs
from quantize.transforms.online import InputTransform

TUNE_TOKENS = 1024  # in a step of tuning


class SequentialPipeline:
    """Transforms and quantizes one block after the other.

    Attributes:
        modules: path → entry of the artifact's quantization settings.
        verification_inputs: two different inputs that prove what is made.
        leading: the tokens in front of every sequence, also of the probes'.
        ties: what was stored of parameters that go by several names.
        ranks: the processes that share the calibration data.
        rounding: of linears that share an input.
        first_batch: number of this one's first batch among those of all ranks.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        program: Program,
        plan: Plan,
        samples: Samples,
        console: Console | None = None,
        once: Once = always,
        ranks: SingleProcess | None = None,
        collected: Surveys | None = None,
        scratch: Path | None = None,
    ) -> None:
        """Calibration activations that do not fit into memory lie in files in the directory `scratch`."""
        self.checkpoint, self.program, self.plan, self.samples = checkpoint, program, plan, samples
        self.ranks = ranks or SingleProcess()
        batch_tokens = TUNE_TOKENS if plan.recipe.tune else BATCH_TOKENS
        self.leading = PrefixTokens(plan.recipe.prefix_tokens)
        runs = plan.calibrates and collected is None
        given = samples.batches(max(1, batch_tokens // plan.recipe.seqlen)) if runs else []
        self.first_batch = self.ranks.shard_slice(len(given)).start
        batches = self.leading.batches(self.ranks.shard(given))
        self.verification_inputs = verification_inputs(samples.rows[-1], program.vocabulary, plan.recipe.seed)
        self.calibration, self.probes = (
            SequentialRunner(program, batches, scratch),
            SequentialRunner(program, self.prefixed_probes()),
        )
        self.float_reference = SequentialRunner(
            program, batches if plan.quantizer.needs_float_reference or plan.recipe.tune else [], scratch
        )
        self.rounding = WeightRounder(plan, self.ranks, self.leading, self.calibration, self.float_reference)
        scheme = plan.recipe.linear_scheme
        surveys = collected or once(
            "survey",
            lambda: collect_global_statistics(checkpoint, program, plan, batches, self.ranks, console, scratch),
        )
        self.pass_runner = PassRunner(
            program, plan.steps, scheme, self.calibration, self.probes, plan.recipe.seed, surveys, self.leading,
            self.ranks,
        )  # fmt: skip
        self.modules: dict[str, dict[str, object]] = {}
        self.ties = TiedWeights(checkpoint.ties)

    def process(self, segment: Segment) -> dict[str, Tensor]:
        """Transform and quantize one block; returns what is stored of it."""
        trim_heap()
        given, dtypes = self._read(segment)
        weights, input_transforms = self.pass_runner.apply(segment, dict(given))
        linears = self.program.linears(segment)
        targets = [linear for linear in linears if linear.path in self.plan.targets]
        replaced = {name for linear in targets for name in (linear.weight, linear.bias)}
        float_reference = (
            float_state(dict(weights), linears, input_transforms) if self.float_reference.values else Overrides({})
        )
        changed = {n: w.to(dtypes[n]) for n, w in weights.items() if n not in replaced and w is not given[n]}
        same = [name for name, w in weights.items() if name not in replaced and w is given[name]]
        del given
        weights |= {name: t.float() for name, t in changed.items()}  # from here on the block runs with what is stored
        biases = {x.path: weights[x.bias].to(dtypes[x.bias]) for x in targets if x.bias}
        state, tensors = (
            self._with_kv_cache(segment, float_state(weights, linears, input_transforms)),
            dict[str, Tensor](),
        )
        tune, finish = self.plan.recipe.tune if targets else None, self.calibrates_after(segment)
        starts = list(self.calibration.values) if tune else []
        with bfloat16_products(calibrates_in_bfloat16(dtypes.values())):
            for group, _ in zip(
                self.calibration.advance_to_linears(segment, state, targets, finish),
                self.float_reference.advance_to_linears(segment, float_reference, targets, finish or tune is not None),
                strict=True,
            ):
                for part in self.rounding.same_input_groups(group, input_transforms, dtypes):
                    for linear, weight in zip(
                        part, self.rounding.quantize(part, state, input_transforms, dtypes), strict=True
                    ):
                        tensors |= self._replace(
                            linear, state, weight, input_transforms[linear.path], biases.get(linear.path)
                        )
                    if not tune:
                        self._free_weight(state, part)
                trim_heap()
        if tune:
            for linear, weight in self._tune(segment, state, starts, targets, tune):
                tensors |= self._replace(linear, state, weight, input_transforms[linear.path], biases.get(linear.path))
            for number, values in enumerate(starts):
                self.calibration.values[number] = values
            self.calibration.run(segment.nodes if finish else (), state)
        self.probes.run(segment.nodes, state)
        del weights, state, float_reference  # what is stored as it was is read again, not held twice
        self._make_contiguous()
        return tensors | self.ties.deduplicate(changed | {name: self.checkpoint.tensor(name) for name in same})

    def _make_contiguous(self) -> None:
        """Lay out all that lives on behind a block as a run that is resumed there finds it."""
        for runner in (self.calibration, self.float_reference, self.probes):
            for number, values in enumerate(runner.values):
                laid_out = {node: contiguous(value) for node, value in values.items()}
                if any(laid_out[node] is not value for node, value in values.items()):
                    runner.values[number] = laid_out
        sites = self.pass_runner.sites
        self.pass_runner.sites = [{basis: contiguous(found) for basis, found in made.items()} for made in sites]

    def _read(self, segment: Segment) -> tuple[dict[str, Tensor], dict[str, torch.dtype]]:
        """The parameters of a block in float32, and the dtypes that they are stored in."""
        given, dtypes = dict[str, Tensor](), dict[str, torch.dtype]()
        for name in segment.parameters:
            given[name], dtypes[name] = self.checkpoint.float_tensor(name), self.checkpoint.tensor(name).dtype
        return given, dtypes

    def calibrates_after(self, segment: Segment) -> bool:
        """Whether anything behind a block looks at the calibration activations."""
        return self.plan.calibrates_after(segment, self.program)

    def _with_kv_cache(self, segment: Segment, state: Overrides) -> Overrides:
        """The block with keys and values as a quantized cache holds them, if the recipe asks for it."""
        args = self.plan.recipe.kv_cache
        operators = quantized_attention(segment, args)
        if args is not None and args.hadamard and operators:
            found = check_hadamard(self.program, segment, state, self.probes.values)
            self.pass_runner.differences.setdefault("kv_cache", {})[segment.name] = found
        return replace(state, operators=operators)

    def unquantized_tensors(self) -> dict[str, Tensor]:
        """Parameters that the forward pass never reads, and buffers, as they are stored."""
        read = {name for segment in self.program.segments for name in segment.parameters}
        unread = [name for name in self.program.parameters.values() if name not in read]
        return (
            self.ties.deduplicate({name: self.checkpoint.tensor(name) for name in unread}) | self.checkpoint.buffers()
        )

    def outputs(self) -> list[Tensor]:
        """The model's outputs on the probes, once all blocks are done."""
        return self.probes.outputs()

    def prefixed_probes(self) -> list[dict[str, Tensor]]:
        """The probes as they run, with the prefix in front."""
        return self.leading.batches(self.verification_inputs)

    def _free_weight(self, state: Overrides, linears: Sequence[Linear]) -> None:
        """Drop float weights that nothing but the linears that were replaced has read."""
        for name in {linear.weight for linear in linears}:
            readers = [n for node, held in self.program.parameters.items() if held == name for n in node.users]
            if all(reader in state.linears for reader in readers):
                state.weights.pop(name, None)

    def _replace(
        self, linear: Linear, state: Overrides, weight: QTensor, input_transform: InputTransform, bias: Tensor | None
    ) -> dict[str, Tensor]:
        """Let the block run with a quantized linear from here on; returns its tensors."""
        scheme = Scheme(weights=weight.args, activations=input_transform.activations)
        bias = input_transform.bias(weight.dequantize(), bias) if input_transform.has_shift else bias
        module = QuantizedLinear(weight, bias, scheme, input_transform.online)
        module.leading, state.linears[linear.node] = self.leading, module
        self.modules[linear.path] = linear_settings(module, self.plan.recipe.activations)
        self.ties.mark_replaced(linear.weight)
        return {f"{linear.path}.{name}": tensor for name, tensor in module.state_dict().items()}

    def _tune(
        self, segment: Segment, state: Overrides, starts: Sequence[Values], linears: Sequence[Linear], args: TuneArgs
    ) -> Iterator[tuple[Linear, QTensor]]:
        """The linears of a block with weights that are rounded together."""
        float_reference = {linear.node: linear.as_out_in(state.weights[linear.weight]) for linear in linears}
        tuning = BlockTuner(
            self.program, segment, state, starts, [block_outputs(v, segment) for v in self.float_reference.values]
        )
        tuned = tuning.run(
            float_reference, args, derived_generator(self.plan.recipe.seed, zlib.crc32(segment.name.encode()))
        )
        return ((linear, tuned[linear.node]) for linear in linears)
