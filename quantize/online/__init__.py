"""What runs in front of a linear where no weight can absorb a transform: one file a kind."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from quantize.online.base import Online as Online
from quantize.online.dual import Dual
from quantize.online.front import Front as Front
from quantize.online.hadamard import Hadamard, hadamard
from quantize.online.shift import Shift

KINDS: dict[str, type[Online]] = {kind.kind: kind for kind in (Dual, Hadamard, Shift)}
__all__ = ["KINDS", "Dual", "Front", "Hadamard", "Online", "Shift", "hadamard", "restore"]


def restore(settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Online:
    """The transform that `settings` (with its `kind`) and the tensors saved with it describe."""
    rest = {key: value for key, value in settings.items() if key != "kind"}
    return KINDS[settings["kind"]].restore(rest, tensors)
