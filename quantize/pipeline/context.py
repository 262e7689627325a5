"""A context holds what is the same for all steps of a run; it is made once and handed down."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch
from rich.console import Console

from quantize.errors import QuantizeError, reason
from quantize.nn.prefix_tokens import PrefixTokens
from quantize.pipeline.distributed import SingleProcess
from quantize.pipeline.placement import Placement
from quantize.pipeline.resume.journal import Journal

T = TypeVar("T")


@dataclass(frozen=True)
class RunContext:
    """The settings and the surroundings of a run.

    Attributes:
        seed: the seed of every random choice; each choice draws from its own generator.
        device: the device of weights and calibration activations.
        ranks: the processes that share the calibration data.
        prefix: the tokens in front of every sequence, whose activations are neither quantized nor counted.
        placement: what stays on the device.
        scratch: a directory for calibration activations that do not fit into memory; None keeps all in memory.
        console: the console that shows progress; None shows nothing.
        journal: the journal that outlives the process, so that a killed run can go on; None keeps nothing.
    """

    seed: int = 0
    device: torch.device = torch.device("cpu")  # noqa: RUF009  immutable
    ranks: SingleProcess = field(default_factory=SingleProcess)
    prefix: PrefixTokens = field(default_factory=PrefixTokens)
    placement: Placement = field(default_factory=Placement)
    scratch: Path | None = None
    console: Console | None = None
    journal: Journal | None = None

    @property
    def gram_device(self) -> torch.device:
        """Where Gram matrices are summed and factored."""
        return self.device if self.placement.grams else torch.device("cpu")

    def cached(self, name: str, make: Callable[[], T]) -> T:
        """Return what `make` returns, or what it returned before the run was killed, if this run resumes one."""
        return make() if self.journal is None else self.journal.cached(name, make, self.device)


class DeviceFullError(QuantizeError):
    """A part of the model, `where`, does not fit into the device's memory."""

    def __init__(self, where: str) -> None:
        super().__init__(f"{where} does not fit into the device's memory; give a smaller --seqlen, or --device cpu")
        self.where = where


@contextlib.contextmanager
def running(name: str) -> Iterator[None]:
    """Turn an error of torch into the reason why a part of the model is not quantized.

    What an operator of the model's graph says of its operands is a sentence already (`run_node`).
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise DeviceFullError(name) from error
    except (IndexError, RuntimeError) as error:
        if "same dtype" in str(error):
            raise QuantizeError(
                f"{name} casts activations to a fixed type, and a run computes in float32; let forward cast them to "
                "the type of the weight that they meet, as in x.to(self.linear.weight.dtype)"
            ) from error
        raise QuantizeError(
            f"the run failed at {name}: {reason(error)}; report this with what --verbose shows"
        ) from error
