"""What of a run stays on its device beside the block at hand, and what gives way where the device is too small."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Placement:
    """What a run holds on a device, where it has a choice.

    Attributes:
        activation_bytes: how many bytes of each runner's calibration activations stay on the device, the rest being in
            the machine's memory or in a file; None leaves all of them there.
        reads_ahead: whether the next block arrives while one is at work.
        together: whether the linears that share an input are rounded together, or else one after the other, each by a
            Gram matrix that is summed anew.
        grams: whether Gram matrices are on the device, or else in the machine's memory, of which the device holds a few
            rows or columns at a time.
        halved: the blocks from which on half as many calibration rows run together as before.
    """

    activation_bytes: int | None = None
    reads_ahead: bool = True
    together: bool = True
    grams: bool = True
    halved: tuple[str, ...] = ()
