"""One run on its way through the blocks: each is transformed, quantized and handed out to be written."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor, fx

from quantize.artifact import METHOD
from quantize.calibration.data import BATCH_TOKENS, Row, Samples
from quantize.calibration.precision import bfloat16_products, calibrates_in_bfloat16
from quantize.calibration.runner import Runner
from quantize.calibration.statistics import Gram, factors, mirror
from quantize.checkpoint import Checkpoint
from quantize.errors import QuantizeError
from quantize.formats.qtensor import QTensor
from quantize.graph.execute import State, Values
from quantize.graph.linears import Linear
from quantize.graph.program import Program, Segment
from quantize.kv_cache import check_hadamard, quantized_attention
from quantize.leading import Leading
from quantize.linear import QuantizedLinear
from quantize.memory import give_back
from quantize.once import Once, always
from quantize.online import Front
from quantize.plan import Plan
from quantize.ranks import Ranks
from quantize.recipe import Recipe
from quantize.scheme import ActivationArgs, Scheme, TuneArgs
from quantize.seeding import private_generator
from quantize.survey import survey
from quantize.transforming import Surveys, Transformer, float_state
from quantize.tuning import Tuning, handed_on

TUNE_TOKENS = 1024  # in a step of tuning
PROBE_TOKENS = 32


class BlockRun:
    """Transforms and quantizes one block after the other.

    Attributes:
        modules: path → entry of the artifact's quantization settings.
        probe_inputs: two different inputs that prove what is made.
        leading: the tokens in front of every sequence, also of the probes'.
        untied: some parameter no longer equals the one it was tied to.
        tied: hash of each tied parameter that was stored.
        ranks: the processes that share the calibration data.
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
        scheme = plan.recipe.linear_scheme
        surveys = collected or once(
            "survey", lambda: survey(checkpoint, program, plan, batches, self.ranks, console, scratch)
        )
        self.transformer = Transformer(
            program, plan.steps, scheme, self.calibration, self.probes, plan.recipe.seed, surveys, self.leading,
            self.ranks,
        )  # fmt: skip
        self.modules: dict[str, dict[str, object]] = {}
        self.untied = False
        self.tied: dict[str, str] = {}

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
                for part in self._parts(group, fronts, dtypes):
                    for linear, weight in zip(part, self._quantize(part, state, fronts, dtypes), strict=True):
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
        return tensors | self._kept(changed | {name: self.checkpoint.tensor(name) for name in same})

    def _read(self, segment: Segment) -> tuple[dict[str, Tensor], dict[str, torch.dtype]]:
        """The parameters of a block in float32, and the dtypes that they are stored in."""
        given, dtypes = dict[str, Tensor](), dict[str, torch.dtype]()
        for name in segment.parameters:
            given[name], dtypes[name] = self.checkpoint.float_tensor(name), self.checkpoint.tensor(name).dtype
        return given, dtypes

    def calibrates_after(self, segment: Segment) -> bool:
        """Whether anything behind a block looks at the calibration activations."""
        segments = self.program.segments
        later = segments[segments.index(segment) + 1 :]
        return bool(later) and (
            bool(self.plan.steps) or any(x.path in self.plan.targets for s in later for x in self.program.linears(s))
        )

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
        return self._kept({name: self.checkpoint.tensor(name) for name in unread}) | self.checkpoint.buffers()

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

    def _parts(
        self, group: Sequence[Linear], fronts: Mapping[str, Front], dtypes: Mapping[str, torch.dtype]
    ) -> list[list[Linear]]:
        """Of linears that share an input, those that see the same of it; they are rounded together."""
        parts: dict[object, list[Linear]] = {}
        for linear in group:
            parts.setdefault((self._seen(fronts[linear.path]), dtypes[linear.weight]), []).append(linear)
        return list(parts.values())

    def _seen(self, front: Front) -> object:
        """What a Gram matrix depends on."""
        return front if self.plan.quantizer.needs_exact else front.rotations

    def _gram(self, source: fx.Node, columns: int, front: Front) -> Gram:
        """Gram matrix of one input; beside the float model's, if the quantizer asks for it, of the rounded input."""
        gram, exact = Gram(), self.plan.quantizer.needs_exact
        totals = gram.totals(columns, 1 + exact)
        self.ranks.sum_products(totals, (factors(*seen) for seen in self._inputs(source, front)))
        mirror(totals[0])
        seen = sum(self.leading.rest(values[source]).numel() for values in self.calibration.values) // columns
        gram.rows = sum(self.ranks.gather(seen))
        return gram

    def _inputs(self, source: fx.Node, front: Front) -> Iterator[tuple[Tensor, Tensor | None]]:
        """What `Gram.update` takes, batch by batch."""
        rest = self.leading.rest
        if not self.plan.quantizer.needs_exact:
            return ((front.rotate(rest(values[source])), None) for values in self.calibration.values)
        pairs = zip(self.calibration.values, self.exact.values, strict=True)
        return ((front.quantized(rest(v[source])), front.rotate(rest(exact[source]))) for v, exact in pairs)

    def _quantize(
        self, part: Sequence[Linear], state: State, fronts: Mapping[str, Front], dtypes: Mapping[str, torch.dtype]
    ) -> list[QTensor]:
        """Round the weights of linears that see the same input."""
        quantizer, first = self.plan.quantizer, part[0]
        give_back()
        gram = self._gram(first.source, first.columns, fronts[first.path]) if quantizer.needs_gram else None
        give_back()
        weights = [linear.oriented(state.weights[linear.weight]) for linear in part]
        mine = [W[self.ranks.part_of(len(W))] for W in weights] if self._splits(weights) else weights
        try:
            found = quantizer.quantize_together(mine, self.plan.recipe.weights, gram, dtypes[first.weight])
        except QuantizeError as error:
            raise QuantizeError(f"{', '.join(linear.path for linear in part)}: {error}") from None
        if not self._splits(weights):
            return found
        shares = self.ranks.gather([weight.tensors() for weight in found])
        return [weight.joined(of_all) for weight, of_all in zip(found, zip(*shares, strict=True), strict=True)]

    def _splits(self, weights: Sequence[Tensor]) -> bool:
        """Whether each rank rounds some rows of the weights: they are rounded apart, but for NVFP4's common unit."""
        return 1 < self.ranks.count <= min(map(len, weights)) and self.plan.recipe.weights.format != "nvfp4"

    def _replace(
        self, linear: Linear, state: State, weight: QTensor, front: Front, bias: Tensor | None
    ) -> dict[str, Tensor]:
        """Let the block run with a quantized linear from here on; returns its tensors."""
        scheme = Scheme(weights=weight.args, activations=front.activations)
        bias = front.bias(weight.dequantize(), bias) if front.shifts else bias
        module = QuantizedLinear(weight, bias, scheme, front.online)
        module.leading, state.linears[linear.node] = self.leading, module
        self.modules[linear.path] = describe(module, self.plan.recipe.activations)
        self.untied |= self._is_tied(linear.weight)
        return {f"{linear.path}.{name}": tensor for name, tensor in module.state_dict().items()}

    def _tune(
        self, segment: Segment, state: State, starts: Sequence[Values], linears: Sequence[Linear], args: TuneArgs
    ) -> Iterator[tuple[Linear, QTensor]]:
        """The linears of a block with weights that are rounded together."""
        exact = {linear.node: linear.oriented(state.weights[linear.weight]) for linear in linears}
        tuning = Tuning(self.program, segment, state, starts, [handed_on(v, segment) for v in self.exact.values])
        tuned = tuning.run(exact, args, private_generator(self.plan.recipe.seed, zlib.crc32(segment.name.encode())))
        return ((linear, tuned[linear.node]) for linear in linears)

    def _kept(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Tensors to store as they are; one that still equals a tied one stored before is left out."""
        kept = dict(tensors)
        for name in (name for name in tensors if self._is_tied(name)):
            digest = hashlib.sha256(tensors[name].contiguous().view(torch.uint8).numpy().data).hexdigest()
            others = [other for other in self.checkpoint.ties[name] if other in self.tied]
            if others and self.tied[others[0]] == digest:
                del kept[name]
            self.untied |= bool(others) and name in kept
            self.tied[name] = digest
        return kept

    def _is_tied(self, name: str) -> bool:
        """Whether a parameter goes by several names."""
        return len(self.checkpoint.ties.get(name, ())) > 1


def probe_inputs(row: Row, vocabulary: int, seed: int) -> list[Row]:
    """Two different inputs of batch 1: a sample, of its token ids the start, and random data of the same shapes."""
    given = {name: (x if x.is_floating_point() else x[:PROBE_TOKENS])[None] for name, x in row.items()}
    rng = np.random.default_rng(seed)
    return [given, {name: random_like(x, vocabulary, rng) for name, x in given.items()}]


def random_like(x: Tensor, vocabulary: int, rng: np.random.Generator) -> Tensor:
    """Ids below the vocabulary, or normal numbers with the mean and deviation of x (1 where it is constant)."""
    if not x.is_floating_point():
        return torch.from_numpy(rng.integers(vocabulary, size=x.shape))
    deviation = float(x.std(correction=0)) or 1.0
    return torch.from_numpy(rng.normal(float(x.mean()), deviation, size=x.shape)).float()


def describe(module: QuantizedLinear, default: ActivationArgs | None) -> dict[str, object]:
    """A quantized linear's entry in the artifact's quantization settings."""
    entry: dict[str, object] = {"columns": module.in_features}
    if len(module.transform):
        entry["online"] = [transform.settings() for transform in module.online]
    if module.scheme.activations != default and module.scheme.activations is not None:
        entry["activations"] = module.scheme.activations.model_dump()
    return entry


def quantization_settings(recipe: Recipe, modules: Mapping[str, Mapping[str, object]]) -> dict[str, Any]:
    """The artifact's quantization settings, with what `describe` says of each linear, by path."""
    scheme = recipe.linear_scheme.model_dump()
    settings: dict[str, Any] = {"quant_method": METHOD, "scheme": scheme, "modules": modules}
    settings |= {"prefix": list(recipe.prefix_tokens)} if recipe.prefix else {}
    return settings | ({"kv_cache": recipe.kv_cache.model_dump()} if recipe.kv_cache else {})
