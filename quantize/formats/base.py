"""What a number format is: the grid that weights are rounded to, and how its values and scales are stored."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import ClassVar, Literal

import torch
from torch import Tensor

from quantize.scheme.registry import Registry
from quantize.scheme.scheme import ActivationArgs, WeightArgs

FORMATS = Registry("number format")
FLOATS = frozenset({torch.float64, torch.float32, torch.float16, torch.bfloat16})


class NumberFormat(ABC):
    """A set of values v, so that w ≈ (v - zero_point) · scale, each group of columns with its own scale.

    Attributes:
        name: what recipes call it.
        element: what a value is: an integer of `num_bits` (`int`), twice an E2M1 value (`e2m1`), or an entry of a
            table (`level`). Kernels and exports, which are written for one of these, ask for it.
        activation_format: of the activations that its values, integers then, are multiplied with; None leaves
            activations in floating point. Activations may have a format that is its own.
        needs: settings of `WeightArgs` and `ActivationArgs` that it fixes.
        group_size: columns that share a scale; None lets the recipe choose.
        defaults: settings of `WeightArgs` for a recipe that names the format and does not choose.
        has_global_scale: there is another scale for the whole matrix.
        scale_dtypes: what scales are stored in.
        scale_search: factors of a group's range that a search for the best scale tries beside 1, in this order.
        value_dtype: holds every value exactly.
        step: the least distance between two values.
        rotation_block: neighbouring channels that a rotation mixes; 0 for all, None if rotating makes the format worse.
    """

    name: ClassVar[str]
    element: ClassVar[Literal["int", "e2m1", "level"]]
    activation_format: ClassVar[str | None] = None
    needs: ClassVar[Mapping[str, object]] = {"num_bits": 4, "symmetric": True}
    group_size: ClassVar[int | None] = None
    defaults: ClassVar[Mapping[str, object]] = {}
    has_global_scale: ClassVar[bool] = False
    scale_dtypes: ClassVar[frozenset[torch.dtype]] = FLOATS
    scale_search: ClassVar[tuple[float, ...]] = tuple(percent / 100 for percent in range(99, 19, -1))
    value_dtype: ClassVar[torch.dtype] = torch.int8
    step: ClassVar[float] = 1.0
    rotation_block: ClassVar[int | None] = 0

    def fixed(self) -> dict[str, object]:
        """The settings that nobody can choose."""
        return {**self.needs, **({} if self.group_size is None else {"group_size": self.group_size})}

    def check(self, args: WeightArgs | ActivationArgs) -> None:
        """Compare settings with what the format needs.

        Raises:
            ValueError: one sentence that says what that is.
        """
        kind = "weights" if isinstance(args, WeightArgs) else "activations"
        if kind == "activations" and self.activation_format != self.name:
            raise ValueError(f"{self.name} is a format of weights; leave the format of the activations out")
        needed = {key: value for key, value in self.fixed().items() if hasattr(args, key)}
        found = {key: getattr(args, key) for key in needed}
        if found != needed:
            settings = listed(f"{key} = {value}" for key, value in needed.items())
            raise ValueError(f"{self.name} {kind} need {settings}, not {listed(map(str, found.values()))}".lower())

    def global_scale(self, W: Tensor) -> Tensor | None:
        """float32 []: the scale of a whole matrix [N, K], from its largest magnitude; None for most formats."""
        del W
        return None

    @abstractmethod
    def compute_qparams(
        self, low: Tensor, high: Tensor, args: WeightArgs, scale_dtype: torch.dtype, global_scale: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Scale > 0 and zero point, float32 in the shape of `low`, whose values span groups of this range.

        Args:
            low, high: least and largest weight of each group, float32 in any shape.
            args: bits, symmetry.
            scale_dtype: of the model; the scale is one that can be stored.
            global_scale: of `global_scale`.
        """

    @abstractmethod
    def round(self, t: Tensor, args: WeightArgs, out: Tensor | None = None) -> Tensor:
        """The values nearest to t = w / scale + zero_point, in its dtype and shape; written to `out` if given."""

    def clipping_range(self, args: WeightArgs) -> tuple[float, float] | None:
        """Ends of the values, as far as rounding a scale can move them; None unless `scale_search` only shrinks."""
        del args
        return None

    @abstractmethod
    def pack(self, values: Tensor, args: WeightArgs) -> Tensor:
        """Values [N, K] in any dtype → what is stored: uint8 [N, ⌈K/2⌉] at 4 bits, the even column low; else int8."""

    @abstractmethod
    def unpack(self, data: Tensor, columns: int, args: WeightArgs) -> Tensor:
        """The inverse of `pack`: `value_dtype` [N, K] with K = `columns`, whatever the bytes say."""

    def encode_scale(self, scale: Tensor, global_scale: Tensor | None, scale_dtype: torch.dtype) -> Tensor:
        """A scale of `compute_qparams` as it is stored."""
        del global_scale
        return scale.to(scale_dtype)

    def decode_scale(self, stored: Tensor, global_scale: Tensor | None) -> Tensor:
        """The inverse of `encode_scale`: floating point."""
        del global_scale
        return stored


def listed(parts: Iterable[str]) -> str:
    """`a, b and c`."""
    *others, last = parts
    return " and ".join([", ".join(others), last] if others else [last])


def get_format(name: str) -> NumberFormat:
    """The format that recipes call so; a recipe or manifest that came through `check_args` names one."""
    found: NumberFormat = FORMATS[name]()
    return found
