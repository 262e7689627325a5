"""A number format is the grid to which weights are rounded, and says how its values and scales are stored."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor

from quantize.scheme.registry import Registry
from quantize.scheme.scheme import ActivationArgs, WeightArgs

FORMATS = Registry("number format")
FLOATS = frozenset({torch.float64, torch.float32, torch.float16, torch.bfloat16})


class NumberFormat(ABC):
    """A set of values v, so that w ≈ (v - zero_point) · scale; each group of columns has its own scale.

    Attributes:
        name: the name in recipes.
        element: the kind of the values: integers of `num_bits` (`int`), twice an E2M1 value (`e2m1`), or entries of a
            table (`level`). Kernels and exporters are written for one kind, and check it.
        activation_format: the format of activations that a product with the values takes; the values must be integers
            then. None leaves activations in floating point. It may be the format itself.
        needs: settings of `WeightArgs` and `ActivationArgs` that the format fixes.
        group_size: the number of columns that share a scale; None lets the recipe choose.
        defaults: settings of `WeightArgs` for a recipe that names the format and does not set them.
        has_global_scale: whether there is another scale, for the whole matrix.
        scale_dtypes: the dtypes in which scales can be stored.
        float16_scales: whether scales are float16 whatever the model's dtype.
        zero_point_dtype: the dtype in which zero points are stored.
        scale_search: factors of a group's range that a search for the best scale tries besides 1, in this order.
        value_dtype: a dtype that holds every value exactly.
        step: the least distance between two values.
        table: the values of all codes, where codes are not the values themselves.
        rotation_block: the number of neighbouring channels that a rotation mixes; 0 for all, None if rotating makes the
            format worse.
    """

    name: ClassVar[str]
    element: ClassVar[Literal["int", "e2m1", "level"]]
    activation_format: ClassVar[str | None] = None
    needs: ClassVar[Mapping[str, object]] = {"num_bits": 4, "symmetric": True}
    group_size: ClassVar[int | None] = None
    defaults: ClassVar[Mapping[str, object]] = {}
    has_global_scale: ClassVar[bool] = False
    scale_dtypes: ClassVar[frozenset[torch.dtype]] = FLOATS
    float16_scales: ClassVar[bool] = False
    zero_point_dtype: ClassVar[torch.dtype] = torch.int8
    scale_search: ClassVar[tuple[float, ...]] = tuple(percent / 100 for percent in range(99, 19, -1))
    value_dtype: ClassVar[torch.dtype] = torch.int8
    step: ClassVar[float] = 1.0
    table: ClassVar[Tensor | None] = None
    rotation_block: ClassVar[int | None] = 0

    def fixed(self) -> dict[str, object]:
        """The settings that the format does not let a recipe choose."""
        return {**self.needs, **({} if self.group_size is None else {"group_size": self.group_size})}

    def check(self, args: WeightArgs | ActivationArgs) -> None:
        """Check that settings are those that the format needs.

        Raises:
            ValueError: a setting is another one; the message says in a sentence what the format needs.
        """
        kind = "weights" if isinstance(args, WeightArgs) else "activations"
        if kind == "activations" and self.activation_format != self.name:
            raise ValueError(f"{self.name} is a format of weights; leave the format of the activations out")
        free = self.element == "int" or self.float16_scales
        if isinstance(args, WeightArgs) and args.scale_dtype is not None and not free:
            raise ValueError(f"scale_dtype is for integers; leave it out of {self.name} weights")
        needed = {key: value for key, value in self.fixed().items() if hasattr(args, key)}
        found = {key: getattr(args, key) for key in needed}
        if found != needed:
            settings = listed(f"{key} = {value}" for key, value in needed.items())
            raise ValueError(f"{self.name} {kind} need {settings}, not {listed(map(str, found.values()))}".lower())

    def global_scale(self, weights: Sequence[Tensor]) -> Tensor | None:
        """Return the scale float32 [] of whole matrices [N, K], by their largest magnitude; None for most formats.

        Matrices that multiply the same input share it, as engines hold them as one.
        """
        del weights
        return None

    @abstractmethod
    def compute_qparams(
        self, low: Tensor, high: Tensor, args: WeightArgs, scale_dtype: torch.dtype, global_scale: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return scale > 0 and zero point, float32 in the shape of `low`; the values then span the groups' ranges.

        Args:
            low, high: the least and the largest weight of each group, float32 in any shape.
            args: the bits and the symmetry.
            scale_dtype: the model's dtype; each scale is rounded to a value that can be stored.
            global_scale: the result of `global_scale`.
        """

    def scale_signs(self, low: Tensor, high: Tensor, args: WeightArgs) -> Tensor | None:
        """Return the sign, 1 or -1 in the shape of `low`, that a search gives each scale; None if all are positive."""
        del low, high, args
        return None

    @abstractmethod
    def round(self, t: Tensor, args: WeightArgs, out: Tensor | None = None) -> Tensor:
        """Return the values nearest to t = w / scale + zero_point, in t's dtype and shape, in `out` if it is given."""

    def clipping_range(self, args: WeightArgs) -> tuple[float, float] | None:
        """Return the ends of the values, as far as rounding a scale can move them; None if `scale_search` can widen."""
        del args
        return None

    @abstractmethod
    def pack(self, values: Tensor, args: WeightArgs) -> Tensor:
        """Pack values [N, K] of any dtype: uint8 [N, ⌈K · b / 8⌉] for b ≤ 4 bits, the first lowest, otherwise int8."""

    @abstractmethod
    def unpack(self, data: Tensor, columns: int, args: WeightArgs) -> Tensor:
        """Undo `pack`: return `value_dtype` [N, K] with K = `columns`, whatever the bytes say."""

    def encode_scale(self, scale: Tensor, global_scale: Tensor | None, scale_dtype: torch.dtype) -> Tensor:
        """Return a scale of `compute_qparams` as it is stored."""
        del global_scale
        return scale.to(torch.float16 if self.float16_scales else scale_dtype)

    def decode_scale(self, stored: Tensor, global_scale: Tensor | None) -> Tensor:
        """Undo `encode_scale`: return floating point."""
        del global_scale
        return stored


def listed(parts: Iterable[str]) -> str:
    """Join parts as in `a, b and c`."""
    *others, last = parts
    return " and ".join([", ".join(others), last] if others else [last])


def get_format(name: str) -> NumberFormat:
    """Return the format of a name, which must be registered, as it is in all settings that passed `check_args`."""
    found: NumberFormat = FORMATS[name]()
    return found
