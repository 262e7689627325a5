"""The time of a run is split into phases, with the part of the machine's matrix product that each phase reaches."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
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
from quantize.pipeline import quantize as pipeline
from quantize.pipeline.block import Block
from quantize.pipeline.sequential import SequentialPipeline
from quantize.quantizers import column_rounding, gptq, rtn

PEAK = 2048  # order of the matrices whose product is the measure
Flops = Callable[..., float]


@dataclass
class Phase:
    """Seconds without those of phases within it, CPU seconds, and floating-point operations of matrix products."""

    seconds: float = 0.0
    cpu: float = 0.0
    flops: float = 0.0


@dataclass
class Phases:
    """Times functions by the name of their phase; a phase within another one is counted only for itself.

    Attributes:
        phases: what was timed, by name.
        running: the phases that are running, each within the one before it.
        last: seconds on the clock and of the CPU at the last switch.
        blocks: the name of each block of a run, and when it began.
    """

    phases: dict[str, Phase] = field(default_factory=dict)
    running: list[str] = field(default_factory=list)
    last: tuple[float, float] = (0.0, 0.0)
    blocks: list[tuple[str, float]] = field(default_factory=list)

    def start(self) -> None:
        """Forget what was timed."""
        self.phases.clear()
        self.blocks.clear()
        self.last = (0.0, 0.0)
        self._switch()

    def timed(self, name: str, run: Callable[..., Any], flops: Flops) -> Callable[..., Any]:
        """Return `run` with its time and its operations counted."""

        @functools.wraps(run)
        def counted(*args: Any, **kwargs: Any) -> Any:
            self._switch()
            self.running.append(name)
            try:
                self._phase(name).flops += flops(*args)
                return run(*args, **kwargs)
            finally:
                self._switch()
                self.running.pop()

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
        return self._phase(self.running[-1] if self.running else "all else")

    def _phase(self, name: str) -> Phase:
        return self.phases.setdefault(name, Phase())

    def _switch(self) -> None:
        """Add the time since the last switch to the running phase, on a GPU until it is done."""
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        now = (time.perf_counter(), time.process_time())
        phase = self._running()
        phase.seconds += now[0] - self.last[0] if self.last[0] else 0.0
        phase.cpu += now[1] - self.last[1] if self.last[0] else 0.0
        self.last = now


def nothing(*_: Any, **__: Any) -> float:
    """Return no operations."""
    return 0.0


def watch() -> Phases:
    """Time the phases of this process's runs from now on."""
    phases = Phases()
    phases.start()

    def begin(_: SequentialPipeline, segment: Segment, *__: Any) -> float:
        phases.blocks.append((segment.name, time.perf_counter()))
        return 0.0

    for owner, attribute, name, flops in (
        (pipeline, "prepare", "prepare", nothing),
        (Block, "read", "read", nothing),
        (SequentialPipeline, "process", "other steps", begin),
        (ArtifactWriter, "add", "write", nothing),
        (pipeline, "finish", "finish", nothing),
        (SequentialRunner, "run", "forward", nothing),
        (gram_sums, "add_product", "Gram", product_flops),
        (gptq, "factor", "solve", lambda *a: len(a[0]) ** 3 / 3),
        (gptq, "compute_qparams", "scales", nothing),
        (rtn, "compute_qparams", "scales", nothing),
        (gptq, "gptq_round", "error feedback", lambda *a: float(a[0].shape[1] * len(a[0]) ** 2)),
        (gptq, "sweep", "sweeps", lambda *a: 2.0 * a[1].shape[1] * len(a[1]) ** 2),
        (column_rounding, "round_columns", "columns", lambda *a: float(a[0].shape[1] * len(a[0]) ** 2)),
    ):
        setattr(owner, attribute, phases.timed(name, getattr(owner, attribute), flops))
    interpreter.run_node = phases.counting(interpreter.run_node)
    return phases


def product_flops(total: Tensor, left: Tensor, right: Tensor, rows: slice, *_: int) -> float:
    """Return the operations of some rows of leftᵀ right; of xᵀx only the part right of the diagonal is computed."""
    columns: int = len(total) - (rows.start if left is right else 0)
    return 2.0 * len(left) * int(rows.stop - rows.start) * columns


def product_rate() -> float:
    """Return floating-point operations in a CPU second of a float32 matrix product, the best of six."""
    a = torch.randn(PEAK, PEAK, generator=torch.Generator().manual_seed(0))
    return 2 * PEAK**3 / best_of(lambda: a @ a, 6, time.process_time)
