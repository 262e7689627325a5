"""The experts of a quantized mixture hold their weights as one stack of integers, and each multiplies its own rows."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from quantize.formats.qtensor import QTensor
from quantize.graph.experts import expert_rows
from quantize.graph.stack_stand_in import Stack
from quantize.nn.cpu_engine import runs_fake_quant
from quantize.nn.gpu_dispatch import (
    gpu_expert_linear,
    has_expert_kernel,
    split_fused_hadamard,
)
from quantize.nn.quantized_linear import QuantizedLinear
from quantize.nn.quantized_weight import QuantizedWeight
from quantize.scheme.scheme import Scheme
from quantize.transforms.online import Online


class QuantizedExperts(QuantizedWeight, Stack):
    """A stack of `count` experts, each a linear of N outputs and K inputs, in the place of a parameter.

    The weight [count · N, K] has the rows of one expert after the other. The module is an operand of products as the
    parameter was (`Stack`).

    Attributes:
        count: the number of experts.
        out_features: N.
        transposed: whether the parameter in whose place it stands is [count, K, N], otherwise [count, N, K].
    """

    computes_in: Tensor  # empty, of the dtype in which the model computes

    def __init__(
        self,
        weight: QTensor,
        bias: Tensor | None,
        scheme: Scheme,
        online: Iterable[Online] = (),
        count: int = 1,
        transposed: bool = False,
    ) -> None:
        super().__init__(weight, bias, scheme, online)
        self.count, self.transposed, self.out_features = count, transposed, len(weight.data) // count
        self.register_buffer("computes_in", torch.empty(0), persistent=False)
        self._experts: dict[int, QuantizedLinear] = {}
        self._unpacked_dtype: torch.dtype | None = None

    @property
    def experts(self) -> QuantizedExperts:  # type: ignore[override]
        """The experts in whose place a `Stack` stands."""
        return self

    @property
    def index(self) -> None:  # type: ignore[override]
        """All experts."""
        return None

    def expert(self, number: int) -> QuantizedLinear:
        """Return one expert, which shares the tensors of the stack; it takes the input as the stack does."""
        number %= self.count
        if number not in self._experts:
            rows = slice(number * self.out_features, (number + 1) * self.out_features)
            bias = None if self.bias is None else self.bias[rows]
            made = QuantizedLinear(self.qtensor().expert(number, self.count), bias, self.scheme, self.online)
            self._experts[number] = made.eval()
        found = self._experts[number]
        found.engine = self.engine
        return found

    def lay_out(self, dtype: torch.dtype) -> None:
        """Lay out the stack for good, or each expert where no kernel multiplies the rows of all."""
        x = torch.empty(1, self.in_features, dtype=dtype, device=self.qweight.device)
        if self._has_kernel(x):
            self.packed()
        else:
            for number in range(self.count):
                self.expert(number).lay_out(dtype)
            if not all(self.expert(number).stored_form_dropped for number in range(self.count)):
                return
        self.qweight = self.qweight.new_empty(0)

    def drop_laid_out(self) -> None:
        """Drop the experts, whose tensors are parts of the stack's, and the weight that is laid out."""
        super().drop_laid_out()
        self._experts = {}

    def __getstate__(self) -> dict[str, Any]:
        """Return what copies and pickles hold, which is no expert apart."""
        return super().__getstate__() | {"_experts": {}}

    @contextlib.contextmanager
    def unpacked(self, dtype: torch.dtype) -> Iterator[None]:
        """Take products in `dtype` until the `with` block ends; all experts are too many to be unpacked at once."""
        self._unpacked_dtype = dtype
        try:
            yield
        finally:
            self._unpacked_dtype = None

    def forward(self, x: Tensor, offs: Tensor | None = None) -> Tensor:
        """Multiply rows [S, K], sorted by expert up to row `offs` [count] of each, or [count, S, K], by their experts.

        Returns:
            [S, N] or [count, S, N]; rows behind the last expert's are zero.
        """
        if self._has_kernel(x):
            ends = offs if offs is not None else torch.arange(1, self.count + 1, device=x.device) * x.shape[1]
            return self._forward_gpu(x.reshape(-1, x.shape[-1]), ends).reshape(*x.shape[:-1], self.out_features)
        return by_expert(x, offs, self.expert_product, self.out_features)

    def fake_quantized(self, x: Tensor, offs: Tensor | None = None) -> Tensor:
        """Compute the same function in floating point, with a float product of quantized and dequantized operands."""
        return by_expert(x, offs, lambda e, rows: self.expert(e).fake_quantized(rows), self.out_features)

    def by_row(self, x: Tensor, numbers: Tensor) -> Tensor:
        """Multiply x [S, m, K], where row s belongs to the expert `numbers` [S]: [S, m, N]."""
        order = numbers.argsort(stable=True)
        ends = torch.bincount(numbers, minlength=self.count).cumsum(0) * x.shape[1]
        y = self.forward(x[order].flatten(0, 1), ends).unflatten(0, (-1, x.shape[1]))
        found: Tensor = y[order.argsort()]
        return found

    def expert_product(self, number: int, x: Tensor) -> Tensor:
        """Multiply x [..., K] by one expert: [..., N]."""
        if self._has_kernel(x):
            rows = x.reshape(-1, x.shape[-1])
            ends = (torch.arange(self.count, device=x.device) >= number % self.count) * len(rows)
            return self._forward_gpu(rows, ends).reshape(*x.shape[:-1], self.out_features)
        expert = self.expert(number)
        with contextlib.nullcontext() if self._unpacked_dtype is None else expert.unpacked(self._unpacked_dtype):
            y: Tensor = expert(x)
            return y

    def weights(self) -> Tensor:
        """Return the weights of all experts in floating point, [count, N, K]."""
        W: Tensor = self.qtensor().dequantize().unflatten(0, (self.count, -1))
        return W

    def _has_kernel(self, x: Tensor) -> bool:
        """Return whether one launch multiplies the rows of all experts."""
        args = self.scheme.activations
        fake_quant = self.engine == "fake_quant" and runs_fake_quant(x, args)
        return not fake_quant and has_expert_kernel(x, self.qtensor(), args)

    def _forward_gpu(self, x: Tensor, ends: Tensor) -> Tensor:
        """Multiply rows [M, K], sorted by expert up to row `ends` [count] of each, in one launch: [M, N]."""
        online, hadamard = split_fused_hadamard(self.online)
        for transform in online:
            x = transform(x)
        assert self.scheme.activations is not None
        return gpu_expert_linear(x, self.packed(), ends, self.bias, self.scheme.activations, hadamard)


def by_expert(x: Tensor, offs: Tensor | None, product: Callable[[int, Tensor], Tensor], out_features: int) -> Tensor:
    """Join the products of each expert's rows, as `QuantizedExperts.forward` takes and returns them.

    Args:
        x, offs: the rows.
        product: maps an expert and its rows [s, K] to [s, N].
        out_features: N.
    """
    if offs is None:
        return torch.stack([product(e, rows) for e, rows in enumerate(x)])
    found = [product(e, x[rows]) for e, rows in expert_rows(offs)]
    done = sum(map(len, found))
    return torch.cat([*found, x.new_zeros(len(x) - done, out_features)])


def quantized_product(
    weight: QTensor,
    bias: Tensor | None,
    scheme: Scheme,
    online: Iterable[Online] = (),
    experts: int | None = None,
    transposed: bool = False,
) -> QuantizedLinear | QuantizedExperts:
    """Make a quantized linear, or with `experts` that many of them whose weights are one stack."""
    if experts is None:
        return QuantizedLinear(weight, bias, scheme, online)
    return QuantizedExperts(weight, bias, scheme, online, experts, transposed)


def replace_parameter(model: nn.Module, path: str, stack: nn.Module | nn.Parameter) -> None:
    """Put experts in the place of a parameter, at the same path, or a parameter in the place of experts."""
    parent, _, leaf = path.rpartition(".")
    owner: Any = model.get_submodule(parent)
    delattr(owner, leaf)
    setattr(owner, leaf, stack)
