"""One run on its way through the blocks: each is transformed, quantized and handed out to be written."""

from __future__ import annotations

import hashlib
from dataclasses import asdict

import numpy as np
import torch
from torch import Tensor

from quantize.calibration.data import Row, Samples
from quantize.calibration.runner import Runner
from quantize.calibration.statistics import Gram
from quantize.checkpoint import Checkpoint
from quantize.errors import QuantizeError
from quantize.formats.qtensor import QTensor
from quantize.graph.execute import State
from quantize.graph.linears import Linear
from quantize.graph.program import Program, Segment
from quantize.linear import HadamardTransform, OnlineHadamard, QuantizedLinear
from quantize.plan import Plan
from quantize.transforming import Transformer, float_state

BATCH_TOKENS = 4096  # calibration tokens that run together
PROBE_TOKENS = 32


class BlockRun:
    """Transforms and quantizes one block after the other.

    Attributes:
        modules: path → entry of the artifact's quantization settings.
        probe_inputs: two different inputs that prove what is made.
        untied: some parameter no longer equals the one it was tied to.
    """

    def __init__(self, checkpoint: Checkpoint, program: Program, plan: Plan, samples: Samples) -> None:
        self.checkpoint, self.program, self.plan, self.samples = checkpoint, program, plan, samples
        needed = plan.quantizer.needs_gram or any(step.handler.needs for step in plan.steps)
        batches = samples.batches(max(1, BATCH_TOKENS // plan.recipe.seqlen)) if needed else []
        self.probe_inputs = probe_inputs(samples.rows[-1], program.vocabulary, plan.recipe.seed)
        self.calibration, self.probes = Runner(program, batches), Runner(program, self.probe_inputs)
        self.transformer = Transformer(program, plan.steps, self.calibration, self.probes, plan.recipe.seed)
        self.modules: dict[str, dict[str, object]] = {}
        self.untied = False
        self._tied: dict[str, str] = {}

    def process(self, segment: Segment) -> dict[str, Tensor]:
        """Transform and quantize one block; returns what is stored of it."""
        stored = {name: self.checkpoint.tensor(name) for name in segment.parameters}
        weights, online = self.transformer.apply(segment, {name: t.float() for name, t in stored.items()})
        linears = self.program.linears(segment)
        targets = [linear for linear in linears if linear.path in self.plan.targets]
        replaced = {linear.weight for linear in targets}
        kept = {name: weights[name].to(t.dtype) for name, t in stored.items() if name not in replaced}
        weights |= {name: t.float() for name, t in kept.items()}  # from here on the block runs with what is stored
        state = float_state(weights, linears, online)
        biases = {linear.bias: f"{linear.path}.bias" for linear in targets if linear.bias}
        tensors = {name: kept.pop(bias) for bias, name in biases.items()}
        for group in self.calibration.stops(segment, state, targets):
            gram = self._gram(group[0], online.get(group[0].path))
            for linear in group:
                weight = self._quantize(linear, state, gram, online.get(linear.path), stored[linear.weight].dtype)
                tensors |= {f"{linear.path}.{name}": t for name, t in weight.tensors().items()}
        self.probes.run(segment.nodes, state)
        return tensors | self._kept(kept)

    def unused(self) -> dict[str, Tensor]:
        """Parameters that the forward pass never reads, and buffers, as they are stored."""
        read = {name for segment in self.program.segments for name in segment.parameters}
        unread = [name for name in self.program.parameters.values() if name not in read]
        return self._kept({name: self.checkpoint.tensor(name) for name in unread}) | self.checkpoint.buffers()

    def outputs(self) -> list[Tensor]:
        """The model's outputs on the probes, once all blocks are done."""
        return self.probes.outputs()

    def _gram(self, linear: Linear, online: OnlineHadamard | None) -> Gram | None:
        """Gram matrix of a linear's input behind its online transform."""
        if not self.plan.quantizer.needs_gram:
            return None
        transform = HadamardTransform(online) if online else torch.nn.Identity()
        gram = Gram()
        for values in self.calibration.values:
            gram.update(transform(values[linear.source]))
        return gram

    def _quantize(
        self, linear: Linear, state: State, gram: Gram | None, online: OnlineHadamard | None, dtype: torch.dtype
    ) -> QTensor:
        """Quantize one linear and let the block run with it from here on."""
        recipe = self.plan.recipe
        try:
            W = linear.oriented(state.weights[linear.weight])
            weight = self.plan.quantizer.quantize(W, recipe.weights, gram, dtype)
        except QuantizeError as error:
            raise QuantizeError(f"{linear.path}: {error}") from None
        bias = state.weights.get(linear.bias or "")
        state.linears[linear.node] = QuantizedLinear(weight, bias, recipe.linear_scheme, online)
        entry: dict[str, object] = {"columns": weight.columns}
        self.modules[linear.path] = entry | ({"hadamard": asdict(online)} if online else {})
        self.untied |= self._is_tied(linear.weight)
        return weight

    def _kept(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Tensors to store as they are; one that still equals a tied one stored before is left out."""
        kept = dict(tensors)
        for name in (name for name in tensors if self._is_tied(name)):
            digest = hashlib.sha256(tensors[name].contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
            others = [other for other in self.checkpoint.ties[name] if other in self._tied]
            if others and self._tied[others[0]] == digest:
                del kept[name]
            self.untied |= bool(others) and name in kept
            self._tied[name] = digest
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
