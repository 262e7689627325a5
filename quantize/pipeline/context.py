"""What is the same for all steps of a run; made once and handed down."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch
from rich.console import Console

from quantize.nn.prefix_tokens import PrefixTokens
from quantize.pipeline.distributed import SingleProcess
from quantize.pipeline.resume.journal import Journal

T = TypeVar("T")


@dataclass(frozen=True)
class RunContext:
    """Where and with whom a run works.

    Attributes:
        seed: seed of every random choice; each draws from a generator of its own.
        device: where weights and calibration activations are.
        ranks: the processes that share the calibration data.
        prefix: the tokens in front of every sequence, whose activations are neither quantized nor counted.
        scratch: directory for calibration activations that do not fit into memory; None keeps all in memory.
        console: where progress is shown; None is silent.
        journal: what outlives the process, so that a killed run goes on; None keeps nothing.
    """

    seed: int = 0
    device: torch.device = torch.device("cpu")  # noqa: RUF009  immutable
    ranks: SingleProcess = field(default_factory=SingleProcess)
    prefix: PrefixTokens = field(default_factory=PrefixTokens)
    scratch: Path | None = None
    console: Console | None = None
    journal: Journal | None = None

    def cached(self, name: str, make: Callable[[], T]) -> T:
        """What `make` gives; a run that goes on takes what it gave before the run was killed."""
        return make() if self.journal is None else self.journal.cached(name, make)
