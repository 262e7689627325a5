"""One run on its way through the blocks: each is transformed, quantized and handed out to be written."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from quantize.calibration.data import BATCH_TOKENS, Samples
from quantize.calibration.precision import bfloat16_products, calibrates_in_bfloat16
from quantize.calibration.runner import Runner
from quantize.checkpoint import Checkpoint
from quantize.formats.qtensor import QTensor
from quantize.graph.execute import State, Values
from quantize.graph.linears import Linear
from quantize.graph.program import Program, Segment
from quantize.group import GroupRounding
from quantize.kv_cache import check_hadamard, quantized_attention
from quantize.leading import Leading
from quantize.linear import QuantizedLinear
from quantize.memory import give_back
from quantize.once import Once, always
from quantize.online import Front
from quantize.plan import Plan
from quantize.probes import probe_inputs
from quantize.ranks import Ranks
from quantize.scheme import Scheme, TuneArgs
from quantize.seeding import private_generator
from quantize.settings import linear_settings
from quantize.survey import survey
from quantize.ties import Ties
from quantize.transforming import Surveys, Transformer, float_state
from quantize.tuning import Tuning, handed_on

TUNE_TOKENS = 1024  # in a step of tuning


class BlockRun:
    """Transforms and quantizes one block after the other.

    Attributes:
        modules: path → entry of the artifact's quantization settings.
        probe_inputs: two different inputs that prove what is made.
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
        ranks: Ranks | None = None,
        collected: Surveys | None = None,
        scratch: Path | None = None,
    ) -> None:
        """Calibration activations that do not fit into memory lie in files in the directory `scratch`."""
        self.checkpoint, self.program, self.plan, self.samples = checkpoint, program, plan, samples
        self.ranks = ranks or Ranks()
        batch_tokens = TUNE_TOKENS if plan.recipe.tune else BATCH_TOKENS
        self.leading = Leading(plan.recipe.prefix_tokens)
        runs = plan.calibrates and collected is None
        given = samples.batches(max(1, batch_tokens // plan.recipe.seqlen)) if runs else []
        self.first_batch = self.ranks.part_of(len(given)).start
        batches = self.leading.batches(self.ranks.share(given))
        self.probe_inputs = probe_inputs(samples.rows[-1], program.vocabulary, plan.recipe.seed)
        self.calibration, self.probes = Runner(program, batches, scratch), Runner(program, self.probes_run())
        self.exact = Runner(program, batches if plan.quantizer.needs_exact or plan.recipe.tune else [], scratch)
        self.rounding = GroupRounding(plan, self.ranks, self.leading, self.calibration, self.exact)
        scheme = plan.recipe.linear_scheme
        surveys = collected or once(
            "survey", lambda: survey(checkpoint, program, plan, batches, self.ranks, console, scratch)
        )
        self.transformer = Transformer(
            program, plan.steps, scheme, self.calibration, self.probes, plan.recipe.seed, surveys, self.leading,
            self.ranks,
        )  # fmt: skip
        self.modules: dict[str, dict[str, object]] = {}
        self.ties = Ties(checkpoint.ties)

    def process(self, segment: Segment) -> dict[str, Tensor]:
        """Transform and quantize one block; returns what is stored of it."""
        give_back()
        given, dtypes = self._read(segment)
        weights, fronts = self.transformer.apply(segment, dict(given))
        linears = self.program.linears(segment)
        targets = [linear for linear in linears if linear.path in self.plan.targets]
        replaced = {name for linear in targets for name in (linear.weight, linear.bias)}
        exact = float_state(dict(weights), linears, fronts) if self.exact.values else State({})
        changed = {n: w.to(dtypes[n]) for n, w in weights.items() if n not in replaced and w is not given[n]}
        same = [name for name, w in weights.items() if name not in replaced and w is given[name]]
        del given
        weights |= {name: t.float() for name, t in changed.items()}  # from here on the block runs with what is stored
        biases = {x.path: weights[x.bias].to(dtypes[x.bias]) for x in targets if x.bias}
        state, tensors = self._with_kv_cache(segment, float_state(weights, linears, fronts)), dict[str, Tensor]()
        tune, finish = self.plan.recipe.tune if targets else None, self.calibrates_after(segment)
        starts = list(self.calibration.values) if tune else []
        with bfloat16_products(calibrates_in_bfloat16(dtypes.values())):
            for group, _ in zip(
                self.calibration.stops(segment, state, targets, finish),
                self.exact.stops(segment, exact, targets, finish or tune is not None),
                strict=True,
            ):
                for part in self.rounding.parts(group, fronts, dtypes):
                    for linear, weight in zip(part, self.rounding.quantize(part, state, fronts, dtypes), strict=True):
                        tensors |= self._replace(linear, state, weight, fronts[linear.path], biases.get(linear.path))
                    if not tune:
                        self._give_up(state, part)
                give_back()
        if tune:
            for linear, weight in self._tune(segment, state, starts, targets, tune):
                tensors |= self._replace(linear, state, weight, fronts[linear.path], biases.get(linear.path))
            for number, values in enumerate(starts):
                self.calibration.values[number] = values
            self.calibration.run(segment.nodes if finish else (), state)
        self.probes.run(segment.nodes, state)
        del weights, state, exact  # what is stored as it was is read again, not held twice
        return tensors | self.ties.kept(changed | {name: self.checkpoint.tensor(name) for name in same})

    def _read(self, segment: Segment) -> tuple[dict[str, Tensor], dict[str, torch.dtype]]:
        """The parameters of a block in float32, and the dtypes that they are stored in."""
        given, dtypes = dict[str, Tensor](), dict[str, torch.dtype]()
        for name in segment.parameters:
            given[name], dtypes[name] = self.checkpoint.float_tensor(name), self.checkpoint.tensor(name).dtype
        return given, dtypes

    def calibrates_after(self, segment: Segment) -> bool:
        """Whether anything behind a block looks at the calibration activations."""
        return self.plan.calibrates_after(segment, self.program)

    def _with_kv_cache(self, segment: Segment, state: State) -> State:
        """The block with keys and values as a quantized cache holds them, if the recipe asks for it."""
        args = self.plan.recipe.kv_cache
        operators = quantized_attention(segment, args)
        if args is not None and args.hadamard and operators:
            found = check_hadamard(self.program, segment, state, self.probes.values)
            self.transformer.differences.setdefault("kv_cache", {})[segment.name] = found
        return replace(state, operators=operators)

    def unused(self) -> dict[str, Tensor]:
        """Parameters that the forward pass never reads, and buffers, as they are stored."""
        read = {name for segment in self.program.segments for name in segment.parameters}
        unread = [name for name in self.program.parameters.values() if name not in read]
        return self.ties.kept({name: self.checkpoint.tensor(name) for name in unread}) | self.checkpoint.buffers()

    def outputs(self) -> list[Tensor]:
        """The model's outputs on the probes, once all blocks are done."""
        return self.probes.outputs()

    def probes_run(self) -> list[dict[str, Tensor]]:
        """The probes as they run, with the prefix in front."""
        return self.leading.batches(self.probe_inputs)

    def _give_up(self, state: State, linears: Sequence[Linear]) -> None:
        """Drop float weights that nothing but the linears that were replaced has read."""
        for name in {linear.weight for linear in linears}:
            readers = [n for node, held in self.program.parameters.items() if held == name for n in node.users]
            if all(reader in state.linears for reader in readers):
                state.weights.pop(name, None)

    def _replace(
        self, linear: Linear, state: State, weight: QTensor, front: Front, bias: Tensor | None
    ) -> dict[str, Tensor]:
        """Let the block run with a quantized linear from here on; returns its tensors."""
        scheme = Scheme(weights=weight.args, activations=front.activations)
        bias = front.bias(weight.dequantize(), bias) if front.shifts else bias
        module = QuantizedLinear(weight, bias, scheme, front.online)
        module.leading, state.linears[linear.node] = self.leading, module
        self.modules[linear.path] = linear_settings(module, self.plan.recipe.activations)
        self.ties.replaced(linear.weight)
        return {f"{linear.path}.{name}": tensor for name, tensor in module.state_dict().items()}

    def _tune(
        self, segment: Segment, state: State, starts: Sequence[Values], linears: Sequence[Linear], args: TuneArgs
    ) -> Iterator[tuple[Linear, QTensor]]:
        """The linears of a block with weights that are rounded together."""
        exact = {linear.node: linear.oriented(state.weights[linear.weight]) for linear in linears}
        tuning = Tuning(self.program, segment, state, starts, [handed_on(v, segment) for v in self.exact.values])
        tuned = tuning.run(exact, args, private_generator(self.plan.recipe.seed, zlib.crc32(segment.name.encode())))
        return ((linear, tuned[linear.node]) for linear in linears)
