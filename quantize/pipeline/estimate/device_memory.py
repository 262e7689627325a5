"""What a run will hold on a device is foretold before it starts, and what does not fit gives way.

Each figure is the most that may be alive at once, in the block that holds most. Two things are not foretold: the cache
of torch's allocator, and comparisons that float32 was not enough for and that are repeated in float64.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from quantize.errors import QuantizeError, UsageError
from quantize.graph.linears import Linear
from quantize.graph.program import Segment
from quantize.pipeline.estimate.memory import MemoryEstimate
from quantize.pipeline.estimate.report import preflight
from quantize.pipeline.placement import Placement
from quantize.pipeline.prepare import Prepared
from quantize.pipeline.steps.stream_experts import streamed
from quantize.quantizers.hessian import PANEL, ROWS

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
LEARNED = 12  # float32 copies of a weight that is tuned: latent, gradient, moments, grids, and what autograd keeps
FOLDED = 4  # float32 copies of a weight while a transform is folded into it in float64
SCORED = 8  # copies of a row's outputs while they are scored
COMING, WEIGHTS, ROUNDED, ACTIVATIONS, HELD_OUT, STATISTICS, WORK = (
    "the next block, as it is stored",
    "the block's weights in float32",
    "its rounded weights, of the result and of plain rounding",
    "calibration activations",
    "rows held back",
    "statistics of the whole model",
    "one micro-batch inside the block, or what rounds a weight",
)


@dataclass(frozen=True)
class DeviceMemory(MemoryEstimate):
    """What a run will hold on a device, in bytes."""

    def held(self, placement: Placement) -> dict[str, int]:
        """Return what is held, each by its name, in the block that holds most."""
        return max((self._held_in(x, placement) for x in self.program.segments), key=lambda held: sum(held.values()))

    def fitted(self, limit: int) -> Placement:
        """Return what gives way so that a run fits: activations, the next block, linears together, Gram matrices.

        Raises:
            QuantizeError: not even then does it fit; the message has the table.
        """
        if sum(self.held(Placement()).values()) <= limit:
            return Placement()
        alone = Placement(0, reads_ahead=False)
        apart = replace(alone, together=False)
        for choice in (Placement(0), alone, apart, replace(apart, grams=False)):
            nothing = self.held(choice)
            if (room := limit - sum(nothing.values())) >= 0:
                return replace(choice, activation_bytes=room // self.runners)
        raise QuantizeError(
            f"the run does not fit into {written(limit)} of the device's memory:\n{table(nothing)}\ngive a smaller "
            "--seqlen, a larger --device-memory, or --device cpu"
        )

    def _held_in(self, segment: Segment, placement: Placement) -> dict[str, int]:
        last = segment is self.program.segments[-1]
        apart = self._filed(segment)
        block = sum(4 * self.parameters[name].numel() for name in segment.parameters if name not in apart)
        linears = [x for x in self.program.linears(segment) if x.path in self.modules and x.weight not in apart]
        rounded = sum(t.nbytes for x in linears for t in self.modules[x.path].state_dict().values())
        stops = sum(count * alive.linear_inputs[segment.name] for count, _, alive in self.alive if not last)
        room = stops if placement.activation_bytes is None else min(stops, placement.activation_bytes)
        judged = sum(count * alive.linear_inputs[segment.name] for count, _, alive in self.held_out_alive if not last)
        return {
            COMING: sum(self._stored_bytes(coming) for coming in self._behind(segment)) * placement.reads_ahead,
            WEIGHTS: block * (1 + bool(self.plan.steps)),
            ROUNDED: 2 * rounded,
            ACTIVATIONS: self.runners * room,
            HELD_OUT: 5 * judged,  # three models, and two of them ahead within the block
            STATISTICS: self._surveyed_bytes(),
            WORK: self._work(segment, placement),
        }

    def _behind(self, segment: Segment) -> Sequence[Segment]:
        """Return the block behind a block, if there is one."""
        number = self.program.segments.index(segment) + 1
        return self.program.segments[number : number + 1]

    def _stored_bytes(self, segment: Segment) -> int:
        """Return the bytes of a block's weights as they arrive, in the dtype in which they are stored."""
        apart = self._filed(segment)
        return sum(self.parameters[name].nbytes for name in segment.parameters if name not in apart)

    def _filed(self, segment: Segment) -> set[str]:
        """Return the weights of experts that are rounded into a file, one after the other."""
        return {linear.weight for linear in streamed(self.checkpoint, self.program, segment, self.plan)}

    def _work(self, segment: Segment, placement: Placement) -> int:
        """Return the most bytes that one step within a block takes for itself."""
        filed = self._filed(segment)
        linears = [x for x in self.program.linears(segment) if x.path in self.modules and x.weight not in filed]
        sizes = [self.parameters[x.weight].numel() for x in linears]
        inner = max((x.peaks[segment.name] for _, _, x in [*self.alive, *self.held_out_alive]), default=0)
        if segment is self.program.segments[-1]:  # the outputs of three models, compared in float64
            inner = max([inner, *(SCORED * x.peaks[segment.name] for _, _, x in self.held_out_alive)])
        sharing = [part for part in self.together(segment) if part[0].weight not in filed]
        parts = sharing if placement.together else [[linear] for part in sharing for linear in part]
        largest = max((self.parameters[name].numel() for name in segment.parameters), default=0)
        unpacked = 4 * sum(sizes)
        return max(
            inner + unpacked,
            inner + 4 * FOLDED * largest * bool(self.plan.steps),
            (4 * LEARNED * sum(sizes) + 4 * inner) * (self.plan.recipe.tune is not None),
            *(
                self._rounding_bytes(part) + factoring_bytes(part[0].columns) - self._away(part, placement)
                for part in parts
            ),
        )

    def _away(self, linears: list[Linear], placement: Placement) -> int:
        """Return the bytes of Gram matrices that are not on the device, less those of their rows that are."""
        return 0 if placement.grams else max(0, self._gram_bytes(linears) - 4 * ROWS * linears[0].columns)


def factoring_bytes(columns: int) -> int:
    """Return the bytes that factoring a Gram matrix [K, K] takes beside it: a panel of columns, and one in float64."""
    panel = min(PANEL, columns)
    return 4 * 4 * columns * panel + 4 * 8 * panel**2


def foretell(prepared: Prepared) -> DeviceMemory:
    """Foretell what a prepared run will hold on a device, from the headers of the files alone."""
    return DeviceMemory(**vars(preflight(prepared)))


def table(held: Mapping[str, int]) -> str:
    """Return what is held on a device as lines, with their sum."""
    rows = {**held, "together": sum(held.values())}
    return "\n".join(f"  {written(size):>10}  {name}" for name, size in rows.items())


def limit_on(device: str, memory: str | None, free: int | None) -> int | None:
    """Return the bytes that a run may hold on a device: what was asked for, or else what is free there.

    Raises:
        UsageError: that is no size, or the device has no memory of its own.
    """
    if device == "cpu" and memory is not None:
        raise UsageError(f"--device-memory {memory} is for a device with memory of its own; give --device cuda, too")
    return free if memory is None else parse_memory(memory)


def foretold_lines(prepared: Prepared, device: str, memory: str | None) -> Iterator[str]:
    """Yield what a dry run says of a device, which need not be there.

    Raises:
        UsageError: as `limit_on`.
        QuantizeError: as `fitted`.
    """
    limit = limit_on(device, memory, None)
    if device == "cpu":
        return
    found = foretell(prepared)
    placement = Placement() if limit is None else found.fitted(limit)
    of = "" if limit is None else f" of {written(limit)}"
    yield f"on {device}{of}, not yet measured on a GPU:\n{table(found.held(placement))}"
    if placement.activation_bytes is not None:
        yield f"gives way: calibration activations beyond {written(placement.activation_bytes)} of each model"
    if not placement.reads_ahead:
        yield "gives way: the next block is read when it is needed"
    if not placement.together:
        yield "gives way: linears that share an input are rounded one after the other"
    if not placement.grams:
        yield "gives way: Gram matrices are in the machine's memory, and the device holds a few rows of them"


def written(size: int) -> str:
    """Return bytes as text, such as `24.0 GB`."""
    unit = next(unit for unit in ("TB", "GB", "MB", "KB", "B") if size >= UNITS[unit] or unit == "B")
    return f"{size / UNITS[unit]:.1f} {unit}"


def parse_memory(text: str) -> int:
    """Return the bytes of a text such as `24GB`.

    Raises:
        UsageError: it is none.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?B)?\s*", text, re.IGNORECASE)
    size = int(float(found[1]) * UNITS[(found[2] or "").upper()]) if found else 0
    if not size:
        raise UsageError(f"--device-memory {text} is no size; give one such as 24GB or 800MB")
    return size
