"""Experts whose integers stay in a file: those of one are read when its rows are multiplied, and never all together."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantize.checkpoint.safetensors_reader import read_rows
from quantize.formats.qtensor import QTensor
from quantize.nn.quantized_experts import QuantizedExperts
from quantize.nn.quantized_linear import QuantizedLinear


class FiledExperts(QuantizedExperts):
    """`QuantizedExperts` that hold no integers.

    Attributes:
        file, path: the safetensors file, and the path of the experts, with which the names of their tensors begin.
    """

    file: Path
    path: str

    @classmethod
    def of(cls, experts: QuantizedExperts, file: Path, path: str) -> FiledExperts:
        """Make filed experts of experts on the meta device, as which they are described."""
        made = cls(experts.qtensor(), experts.bias, experts.scheme, experts.online, experts.count, experts.transposed)
        made.file, made.path, made.computes_in = file, path, experts.computes_in
        return made

    def expert(self, number: int) -> QuantizedLinear:
        """Read one expert."""
        weight = QTensor(
            self._rows(number, "qweight", self.qweight),
            self._rows(number, "scale", self.scale),
            None if self.zero_point is None else self._rows(number, "zero_point", self.zero_point),
            self.in_features,
            self.scheme.weights,
            None if self.global_scale is None else self._rows(number, "global_scale", self.global_scale),
        ).expert(0, 1)
        weight.check(f"{self.path}.{number}")
        bias = None if self.bias is None else self._rows(number, "bias", self.bias)
        made = QuantizedLinear(weight, bias, self.scheme, self.online).eval()
        made.engine = self.engine
        return made

    @contextlib.contextmanager
    def turn(self, number: int, dtype: torch.dtype) -> Iterator[Callable[[Tensor], Tensor]]:
        """Hold one expert, which takes its product in `dtype`."""
        expert = self.expert(number)
        with expert.unpacked(dtype):
            yield expert

    def _rows(self, number: int, name: str, like: Tensor) -> Tensor:
        return self._read(name, like, number % self.count * self.out_features, self.out_features)

    def _read(self, name: str, like: Tensor, *rows: int) -> Tensor:
        return read_rows(self.file, f"{self.path}.{name}", *rows).to(self.computes_in.device, like.dtype)

    def to(self, *args: Any, **kwargs: Any) -> FiledExperts:
        """Move what is computed, as there are no integers to move."""
        self.computes_in = self.computes_in.to(*args, **kwargs)
        self.transform.to(*args, **kwargs)
        return self
