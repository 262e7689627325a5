"""Online transforms run in front of a linear where no weight can absorb a transform; each kind is one file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from quantize.transforms.online.base import Online as Online
from quantize.transforms.online.blocks import Blocks
from quantize.transforms.online.dual_rotation import Dual
from quantize.transforms.online.hadamard import Hadamard, hadamard
from quantize.transforms.online.input_transform import InputTransform as InputTransform
from quantize.transforms.online.shift import Shift

KINDS: dict[str, type[Online]] = {kind.kind: kind for kind in (Blocks, Dual, Hadamard, Shift)}
__all__ = ["KINDS", "Blocks", "Dual", "Hadamard", "InputTransform", "Online", "Shift", "hadamard", "restore"]


def restore(settings: Mapping[str, Any], tensors: Mapping[str, Tensor], columns: int) -> Online:
    """Restore the transform of [..., columns] that `settings` (with its `kind`) and the saved tensors describe.

    Raises:
        ValueError: the transform would be larger than what it transforms.
    """
    sizes = [value for value in settings.values() if isinstance(value, int)]
    if any(size < 1 for size in sizes) or columns % math.prod(sizes):
        raise ValueError(f"sizes of {columns} channels must divide them")
    rest = {key: value for key, value in settings.items() if key != "kind"}
    return KINDS[settings["kind"]].restore(rest, tensors)
