"""The time of a run is split into phases, with the part of the machine's matrix product that each phase reaches."""

from __future__ import annotations

import contextlib
import functools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from benchmarks.machine import best_of
from quantize.artifact.writer import ArtifactWriter
from quantize.calibration import gram_sums
from quantize.calibration.runner import SequentialRunner
from quantize.graph import interpreter
from quantize.graph.interpreter import Values
from quantize.graph.program import Segment
from quantize.graph.shapes import multiply_adds
from quantize.pipeline import block_loop
from quantize.pipeline import quantize as pipeline
from quantize.pipeline.block import Block
from quantize.pipeline.resume.journal import Journal
from quantize.pipeline.sequential import SequentialPipeline
from quantize.quantizers import column_rounding, gptq, rtn

WAITING = "waiting"  # of the main thread, for the next block to be read or the last one to be written
PEAK = 2048  # order of the matrices whose product is the measure
Flops = Callable[..., float]


@dataclass
class Phase:
    """Seconds without those of phases within it, CPU seconds, and floating-point operations of matrix products.

    `aside` are those of the seconds that passed in threads that read and write, beside the main one.
    """

    seconds: float = 0.0
    aside: float = 0.0
    cpu: float = 0.0
    flops: float = 0.0


@dataclass
class Phases:
    """Times functions by the name of their phase; a phase within another one is counted only for itself.

    Attributes:
        phases: what was timed, by name.
        mine: what each thread has for itself: the phases that are `running`, each within the one before it, and the
            seconds on the clock and of the CPU at the `last` switch.
        elsewhere: CPU seconds of the threads that read and write, which the main thread's do not include.
        blocks: the name of each block of a run, and when it began; then `finish`, and when that began.
    """

    phases: dict[str, Phase] = field(default_factory=dict)
    mine: Mine = field(default_factory=lambda: Mine())
    elsewhere: float = 0.0
    blocks: list[tuple[str, float]] = field(default_factory=list)

    def start(self) -> None:
        """Forget what was timed."""
        self.phases.clear()
        self.blocks.clear()
        self.mine.last = (0.0, 0.0)
        self._switch()

    def hidden(self) -> float:
        """Return the seconds of reading and writing in which the main thread did not wait for them, but computed."""
        return sum(phase.aside for phase in self.phases.values()) - self._phase(WAITING).seconds

    def timed(self, name: str, run: Callable[..., Any], flops: Flops) -> Callable[..., Any]:
        """Return `run` with its time and its operations counted."""

        @functools.wraps(run)
        def counted(*args: Any, **kwargs: Any) -> Any:
            self._switch()
            self.mine.running.append(name)
            try:
                self._phase(name).flops += flops(*args)
                return run(*args, **kwargs)
            finally:
                self._switch()
                self.mine.running.pop()

        return counted

    def counting(self, run: Callable[..., Any]) -> Callable[..., Any]:
        """Return `interpreter.run_node` with the operations of the node counted for the running phase."""

        @functools.wraps(run)
        def counted(program: Any, node: fx.Node, values: Values, state: Any) -> Any:
            value = run(program, node, values, state)

            def shape(n: fx.Node) -> Sequence[int]:
                found: Tensor = value if n is node else values.get(n, n.meta["val"])
                return found.shape

            self._running().flops += 2.0 * multiply_adds(node, shape)
            return value

        return counted

    def _running(self) -> Phase:
        return self._phase(self.mine.running[-1] if self.mine.running else "all else")

    def _phase(self, name: str) -> Phase:
        return self.phases.setdefault(name, Phase())

    def _switch(self) -> None:
        """Add the time since the last switch to the running phase, in the main thread on a GPU until it is done."""
        main = threading.current_thread() is threading.main_thread()
        if main and torch.cuda.is_initialized():
            torch.cuda.synchronize()
        now = (time.perf_counter(), time.process_time() - self.elsewhere if main else time.thread_time())
        before, self.mine.last = self.mine.last, now
        if before[0] and (main or self.mine.running):
            phase = self._running()
            phase.seconds += now[0] - before[0]
            phase.aside += 0.0 if main else now[0] - before[0]
            phase.cpu += now[1] - before[1]
            self.elsewhere += 0.0 if main else now[1] - before[1]


class Mine(threading.local):
    """What a thread has for itself."""

    def __init__(self) -> None:
        self.running: list[str] = []
        self.last = (0.0, 0.0)


def nothing(*_: Any, **__: Any) -> float:
    """Return no operations."""
    return 0.0


@contextlib.contextmanager
def watch() -> Iterator[Phases]:
    """Time the phases of this process's runs within the context."""
    phases = Phases()
    phases.start()

    def begin(_: SequentialPipeline, segment: Segment, *__: Any) -> float:
        phases.blocks.append((segment.name, time.perf_counter()))
        return 0.0

    def end(*_: Any) -> float:
        phases.blocks.append(("finish", time.perf_counter()))
        return 0.0

    watched = (
        (pipeline, "prepare", "prepare", nothing),
        (SequentialPipeline, "read", "read", nothing),
        (Block, "read", "widen", nothing),
        (SequentialPipeline, "process", "other steps", begin),
        (block_loop, "go_on", WAITING, nothing),
        (block_loop, "write_block", "write", nothing),
        (Journal, "store_block", "store state", nothing),
        (ArtifactWriter, "add", "write", nothing),
        (pipeline, "finish", "finish", end),
        (SequentialRunner, "run", "forward", nothing),
        (gram_sums, "add_product", "Gram", product_flops),
        (gptq, "factor", "solve", lambda *a: len(a[0]) ** 3 / 3),
        (gptq, "compute_qparams", "scales", nothing),
        (rtn, "compute_qparams", "scales", nothing),
        (gptq, "gptq_round", "error feedback", lambda *a: float(a[0].shape[1] * len(a[0]) ** 2)),
        (gptq, "sweep", "sweeps", lambda *a: 2.0 * a[1].shape[1] * len(a[1]) ** 2),
        (column_rounding, "round_columns", "columns", lambda *a: float(a[0].shape[1] * len(a[0]) ** 2)),
    )
    before = [(owner, attribute, vars(owner)[attribute]) for owner, attribute, *_ in watched]
    before.append((interpreter, "run_node", interpreter.run_node))
    for owner, attribute, name, flops in watched:
        setattr(owner, attribute, phases.timed(name, getattr(owner, attribute), flops))
    interpreter.run_node = phases.counting(interpreter.run_node)
    try:
        yield phases
    finally:
        for owner, attribute, run in before:
            setattr(owner, attribute, run)


def product_flops(total: Tensor, left: Tensor, right: Tensor, rows: slice, *_: int) -> float:
    """Return the operations of some rows of leftᵀ right; of xᵀx only the part right of the diagonal is computed."""
    columns: int = len(total) - (rows.start if left is right else 0)
    return 2.0 * len(left) * int(rows.stop - rows.start) * columns


def product_rate() -> float:
    """Return floating-point operations in a CPU second of a float32 matrix product, the best of six."""
    a = torch.randn(PEAK, PEAK, generator=torch.Generator().manual_seed(0))
    return 2 * PEAK**3 / best_of(lambda: a @ a, 6, time.process_time)
