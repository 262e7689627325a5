"""The memory and the disk space that a run will take are estimated before it reads a weight.

Both follow from the shapes of all values in the graph, for inputs as long as the calibration data.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from quantize.calibration.data import BATCH_TOKENS, Row
from quantize.calibration.spill import IN_MEMORY
from quantize.calibration.statistics import Rows
from quantize.graph.linears import Linear, by_input
from quantize.graph.program import Segment
from quantize.graph.shapes import LiveBytes, ShapeInfo, walk
from quantize.kernels.hadamard import hadamard_factors
from quantize.passes.rotate import Rotate
from quantize.pipeline.estimate.artifact_size import ArtifactEstimate
from quantize.pipeline.held_out_runs import scored_length
from quantize.pipeline.sequential import TUNE_TOKENS
from quantize.pipeline.steps.stream_experts import streamed
from quantize.transforms.online import Hadamard

BatchShapes = tuple[tuple[str, tuple[int, ...]], ...]  # each input's name and shape


@dataclass(frozen=True)
class MemoryEstimate(ArtifactEstimate):
    """The memory and the disk space that a run will take."""

    @property
    def batch(self) -> int:
        """The number of calibration rows that run together."""
        tokens = TUNE_TOKENS if self.plan.recipe.tune else BATCH_TOKENS
        return self.program.batch or (max(1, tokens // self.plan.recipe.seqlen) if not self.plan.recipe.prefix else 1)

    @functools.cached_property
    def batches(self) -> Counter[BatchShapes]:
        """The shapes of the inputs of a batch → the number of batches that have them."""
        return self._shapes(self.samples.batches(self.batch) if self.plan.calibrates else [])

    def _shapes(self, given: Iterable[Row]) -> Counter[BatchShapes]:
        p = len(self.plan.recipe.prefix_tokens)
        return Counter(
            tuple((name, (*x.shape[:1], *(n + p for n in x.shape[1:2]), *x.shape[2:])) for name, x in rows.items())
            for rows in given
        )

    @functools.cached_property
    def alive(self) -> list[tuple[int, ShapeInfo, LiveBytes]]:
        """For each shape of batch the number of such batches, the shapes of all values, and the bytes alive."""
        return self._alive(self.batches)

    @functools.cached_property
    def held_out_alive(self) -> list[tuple[int, ShapeInfo, LiveBytes]]:
        """The same of the rows that are held back, each a batch of its own."""
        return self._alive(self._shapes(self.held_out.batches(scored_length(self.program.vocabulary))))

    def _alive(self, batches: Counter[BatchShapes]) -> list[tuple[int, ShapeInfo, LiveBytes]]:
        found = [(count, ShapeInfo(self.program, dict(shapes))) for shapes, count in batches.items()]
        return [(count, sizes, walk(sizes)) for count, sizes in found]

    @property
    def runners(self) -> int:
        """The number of passes over the calibration data: the quantized model's, and the float model's if needed."""
        return 1 + (self.plan.quantizer.needs_float_reference or self.plan.recipe.tune is not None)

    def journal_bytes(self) -> int:
        """Return the bytes of the journal: the activations at two borders at once, and the global statistics.

        Rows that are held back go through three models, for one of which experts that are not held lie in a file.
        """
        borders = [
            self.runners * self.border_bytes(segment)
            + 3 * sum(count * alive.borders[segment.name] for count, _, alive in self.held_out_alive)
            for segment in self.carrying
        ]
        plain = [self._plain_bytes(segment) for segment in self.program.segments] if self.held_out.rows else []
        return 2 * max([0, *borders]) + self._surveyed_bytes() + max([0, *plain])

    def _plain_bytes(self, segment: Segment) -> int:
        """Return the bytes of the plainly rounded experts of a block that are not held."""
        large = streamed(self.checkpoint, self.program, segment, self.plan) if self.plan.calibrates else []
        return sum(x.nbytes for linear in large for x in self.modules[linear.path].state_dict().values())

    def border_bytes(self, segment: Segment) -> int:
        """Return the bytes of the activations of all batches that are alive after a block."""
        return sum(count * alive.borders[segment.name] for count, _, alive in self.alive)

    @property
    def carrying(self) -> tuple[Segment, ...]:
        """The blocks after which calibration goes on."""
        return self.program.segments[:-1]

    def _surveyed_bytes(self) -> int:
        rows = sum(min(Rows.LIMIT, count * sizes.rows) for count, sizes, _ in self.alive)
        columns = [self.parameters[name].shape[-1] for step in self.plan.steps for name in step.surveyed]
        return 4 * rows * sum(columns)

    def memory_bytes(self) -> int:
        """Return the most bytes that a run adds to what this process holds already.

        The peak is in one of the blocks. It holds the activations of all batches, as far as they stay in memory, the
        block in float32 before and after a pass, without the weights that are rounded already, and what one batch or
        the quantizer needs in between.
        """
        return max(self._segment_bytes(segment) for segment in self.program.segments) + self._surveyed_bytes()

    def _segment_bytes(self, segment: Segment) -> int:
        last = segment is self.program.segments[-1]
        stops = sum(count * alive.linear_inputs[segment.name] for count, _, alive in self.alive if not last)
        inner = max((alive.peaks[segment.name] for _, _, alive in self.alive), default=0)
        copies, large = 1 + bool(self.plan.steps), streamed(self.checkpoint, self.program, segment, self.plan)
        apart = {linear.weight for linear in large}
        block = sum(4 * copies * self.parameters[name].numel() for name in segment.parameters if name not in apart)
        most = max([block + inner, *(block + 8 * self.parameters[x.weight][0].numel() for x in large)])
        for sharing in self.together(segment):
            most = max(most, block + self._rounding_bytes(sharing))
            held = [linear for linear in sharing if linear not in large] if self._gives_up else []
            block -= sum(4 * self.parameters[linear.weight].numel() for linear in held)
        return self.runners * min(stops, IN_MEMORY) + most

    @property
    def _gives_up(self) -> bool:
        """Whether float weights are freed as soon as they are rounded."""
        return self.plan.recipe.tune is None

    def together(self, segment: Segment) -> list[list[Linear]]:
        """Return the linears of a block that the quantizer rounds, those with the same input together."""
        return by_input(x for x in self.program.linears(segment) if x.weight in self.plan.reader_schemes)

    def _rounding_bytes(self, linears: list[Linear]) -> int:
        """Return the quantizer's bytes: copies of the weights that share an input, H in float32, drift and input.

        Of experts one is rounded at a time.
        """
        N, K = [self.modules[linear.path].out_features for linear in linears], linears[0].columns
        if not self.plan.quantizer.needs_gram:
            return 2 * max(N) * K
        float_reference = self.plan.quantizer.needs_float_reference
        rows = max((sizes.rows for _, sizes, _ in self.alive), default=0)
        rounded = self.plan.schemes[linears[0].path].activations is not None
        seen = 4 * rows * K * (1 + 4 * (float_reference and rounded))
        copies = (3 + float_reference) * sum(N) + max(N) * (1 + 2 * float_reference)
        return self._gram_bytes(linears) + max(4 * K * copies, seen)

    def _gram_bytes(self, linears: list[Linear]) -> int:
        """Return the bytes of Gram matrices and drifts; of experts there are one expert's, and that of all rows."""
        quantizer, K = self.plan.quantizer, linears[0].columns
        grams = 2 if linears[0].experts is not None else 1
        return quantizer.needs_gram * 4 * grams * (1 + quantizer.needs_float_reference) * K * K

    def hadamards(self) -> Iterator[str]:
        """Yield the sizes of the Hadamard matrices of each pass, in lines."""
        schemes = self.plan.reader_schemes
        for handler, sites in ((step.handler, step.sites) for step in self.plan.steps):
            if isinstance(handler, Rotate):
                read = {b: [schemes[e.parameter] for e in b.readers if e.parameter in schemes] for b in sites}
                offline = Counter(handler.order(b.dim // b.heads, *found) for b, found in read.items())
                yield from (
                    f"{handler.name}: {n} bases offline, order {kronecker_factors(k)}" for k, n in offline.items()
                )
        online = Counter((t.size, t.stride) for m in self.modules.values() for t in m.online if isinstance(t, Hadamard))
        for (size, stride), count in online.items():
            across = f" across heads of {stride}" if stride > 1 else ""
            yield f"online in front of {count} linears: order {kronecker_factors(size)}{across}"


def kronecker_factors(n: int) -> str:
    """Return a text such as `768 = 24 ⊗ 32`, which says if this is no Hadamard matrix."""
    a, b = hadamard_factors(n)
    flat = all(float((x.abs() - x.abs().max()).abs().max()) < 1e-9 for x in (a, b))
    why = "" if flat else " (orthogonal, with entries of unequal size: no Hadamard matrix of this order is known here)"
    return f"{n} = {len(a)} ⊗ {len(b)}{why}"
