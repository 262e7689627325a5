"""Tensors move between the machine's memory and a device beside the computation, and are waited for before their use.

On a CPU nothing moves, and nothing is waited for. On CUDA each direction has a stream of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from quantize.calibration.spill import pinned_copy

Arriving = Callable[[], Tensor]  # waits for a tensor and returns it, once


class Copies(Protocol):
    """Begins copies; what a copy reads must not change before it is waited for."""

    def to_device(self, x: Tensor) -> Arriving:
        """Begin to copy a tensor of the CPU to the device; the thread that computes with it waits for it."""

    def to_cpu(self, x: Tensor) -> Arriving:
        """Begin to copy a tensor of the device, which is being computed, to the CPU; any thread waits for it."""


class AtOnce:
    """Copies that are done when they are asked for."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def to_device(self, x: Tensor) -> Arriving:
        """Copy a tensor to the device."""
        return arrived(x.to(self.device))

    def to_cpu(self, x: Tensor) -> Arriving:
        """Copy a tensor to the CPU."""
        return arrived(x.cpu())


class OnStreams:
    """Copies on two streams of a CUDA device, by way of pinned memory (not yet measured)."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.up, self.down = device, torch.cuda.Stream(device), torch.cuda.Stream(device)

    def to_device(self, x: Tensor) -> Arriving:
        """Copy from pinned memory, which torch keeps until the copy is done."""
        with torch.cuda.stream(self.up):
            made = x.pin_memory().to(self.device, non_blocking=True)
            done = self.up.record_event()

        def wait() -> Tensor:
            computing = torch.cuda.current_stream(self.device)
            computing.wait_event(done)
            made.record_stream(computing)  # whose memory is not given away before the computation has read it
            return made

        return wait

    def to_cpu(self, x: Tensor) -> Arriving:
        """Copy into pinned memory once what is being computed now is done; the source lives until then."""
        self.down.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.down):
            made = pinned_copy(x)
            done = self.down.record_event()

        def wait(source: Tensor = x) -> Tensor:
            done.synchronize()
            del source
            return made

        return wait


def arrived(x: Tensor) -> Arriving:
    """Return a tensor that need not be waited for."""
    return lambda: x


def copies_for(device: torch.device) -> Copies:
    """Return what copies to a device and from it."""
    return OnStreams(device) if device.type == "cuda" else AtOnce(device)
