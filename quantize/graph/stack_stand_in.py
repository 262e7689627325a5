"""A stand-in for a stack of weights lets the code of any module that multiplies with it multiply with integers.

Torch asks an operand that is no tensor, by `__torch_function__`, what an operator on it is. So a model's own code runs
as it is: transformers' grouped and batched products as well as loops over experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from quantize.graph.einsum import expert_product, parse

Index = int | Tensor | None


class Experts(Protocol):
    """What a stand-in asks of the experts, which `QuantizedExperts` are."""

    count: int
    in_features: int
    out_features: int
    computes_in: Tensor
    qweight: Tensor

    def __call__(self, x: Tensor, offs: Tensor | None = None) -> Tensor:
        """Multiply the rows of all experts."""

    def by_row(self, x: Tensor, numbers: Tensor) -> Tensor:
        """Multiply rows, each by the expert of its number."""

    def expert_product(self, number: int, x: Tensor) -> Tensor:
        """Multiply the rows of one expert."""

    def weights(self) -> Tensor:
        """Return the weights of all experts in floating point, [count, N, K]."""


class Stack:
    """What looks like a tensor of weights [..., N, K], or like its transpose: all experts, one of them, or some by row.

    A subclass says `experts`, `index` (None for all experts, the number of one, or numbers int64 [S]), and `transposed`
    (whether the last two axes are [K, N]). Operators that are not known here get the weights in floating point.
    """

    experts: Experts
    index: Index
    transposed: bool

    @property
    def shape(self) -> torch.Size:
        """The shape of the tensor in whose place it stands."""
        of, last = self.experts, (self.experts.out_features, self.experts.in_features)
        first = {int: (), type(None): (of.count,)}.get(type(self.index))
        first = tuple(self.index.shape) if isinstance(self.index, Tensor) else first
        return torch.Size((*(first or ()), *(reversed(last) if self.transposed else last)))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which the model computes."""
        return self.experts.computes_in.dtype

    @property
    def device(self) -> torch.device:
        """The device of the integers."""
        return self.experts.qweight.device

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return len(self.shape)

    def dim(self) -> int:
        """Return the number of axes."""
        return self.ndim

    def size(self, axis: int | None = None) -> Any:
        """Return the shape, or the size of one axis."""
        return self.shape if axis is None else self.shape[axis]

    def __len__(self) -> int:
        """Return the size of the first axis."""
        return self.shape[0]

    def data_ptr(self) -> int:
        """Return where the integers lie."""
        return self.experts.qweight.data_ptr()

    def __getitem__(self, index: Any) -> Any:
        """Return the weights of one expert, or for each of several rows those of its expert."""
        whole = isinstance(index, Tensor) and index.dtype in (torch.int32, torch.int64)
        if self.index is not None or not (whole or isinstance(index, int)):
            return self.dequantize()[index]
        if isinstance(index, Tensor) and index.dim():
            return StackView(self.experts, index, self.transposed)
        if not -len(self) <= int(index) < len(self):
            raise IndexError(f"expert {int(index)} of {len(self)}")
        return StackView(self.experts, int(index) % len(self), self.transposed)

    def transpose(self, first: int, second: int) -> Any:
        """Return the transpose, if the last two axes are exchanged."""
        last = {self.ndim - 1, self.ndim - 2}
        if {first % self.ndim, second % self.ndim} != last:
            return self.dequantize().transpose(first, second)
        return StackView(self.experts, self.index, not self.transposed)

    @property
    def mT(self) -> Any:  # noqa: N802
        """The transpose of the last two axes."""
        return self.transpose(-2, -1)

    def t(self) -> Any:
        """Return the transpose of one expert's weights."""
        return self.transpose(0, 1)

    T = property(t)

    def __getattr__(self, name: str) -> Any:
        """Return what a tensor of the weights in floating point has, such as its mean."""
        if name.startswith("_") or not hasattr(Tensor, name):
            raise AttributeError(name)
        return getattr(self.dequantize(), name)

    def contiguous(self) -> Self:
        """Return itself."""
        return self

    def dequantize(self) -> Tensor:
        """Return the weights in floating point, as the tensor would hold them."""
        W = self.experts.weights().to(self.dtype)
        W = W if self.index is None else W[self.index]
        return W.mT if self.transposed else W

    def matmul(self, x: Tensor) -> Tensor | None:
        """Return x Wᵀ for the weights W [..., N, K] and x [..., K] as a batched product takes it; None if not known."""
        if isinstance(self.index, int):
            return self.experts.expert_product(self.index, x)
        if x.dim() == 3 and self.ndim == 3 and x.shape[0] == self.shape[0]:
            return self.experts(x) if self.index is None else self.experts.by_row(x, self.index)
        leading, given = self.shape[:-2], x.shape[:-2]
        if x.dim() < 2 or len(given) > len(leading) or torch.broadcast_shapes(given, leading) != leading:
            return None
        x = x.expand(*leading, *x.shape[-2:])
        if self.index is None:
            return self.experts(x)
        y: Tensor = self.experts.by_row(x.flatten(0, -3), self.index.flatten()).unflatten(0, leading)
        return y

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Compute what an operator on stand-ins computes, in floating point where none of `PRODUCTS` knows it."""
        del types
        kwargs = kwargs or {}
        product = PRODUCTS.get(getattr(function, "__name__", ""))
        if product is not None and (found := product(*args, **kwargs)) is not None:
            return found
        args, kwargs = tree_map_only(Stack, Stack.dequantize, (args, kwargs))
        return function(*args, **kwargs)


@dataclass(frozen=True, eq=False)
class StackView(Stack):
    """One expert's weights, or some by row, or a transpose."""

    experts: Experts
    index: Index
    transposed: bool


def linear(x: Any, weight: Any, bias: Tensor | None = None) -> Tensor | None:
    """Compute `torch.nn.functional.linear` with one expert's weights."""
    if not (isinstance(weight, Stack) and isinstance(weight.index, int)) or weight.transposed:
        return None
    y = weight.matmul(x)
    return y if bias is None or y is None else y + bias


def matmul(x: Any, y: Any) -> Tensor | None:
    """Compute a product, be the weights left or right."""
    if isinstance(y, Stack) and isinstance(x, Tensor):
        return y.matmul(x) if y.transposed else None
    if isinstance(x, Stack) and isinstance(y, Tensor) and y.dim() > 1 and not x.transposed:
        found = x.matmul(y.mT)
        return None if found is None else found.mT
    return None


def grouped(x: Any, weight: Any, offs: Tensor | None = None, bias: Any = None, out_dtype: Any = None) -> Tensor | None:
    """Compute the product of rows that are sorted by expert, up to which row for each expert in `offs`."""
    if not isinstance(weight, Stack) or weight.index is not None or not weight.transposed or bias is not None:
        return None
    y = None if offs is None else weight.experts(x, offs)
    return y if out_dtype is None or y is None else y.to(out_dtype)


def einsum(equation: Any, *operands: Any) -> Tensor | None:
    """Compute `torch.einsum` of rows with the weights of all experts, or of some by row."""
    given: tuple[Any, ...] = tuple(operands[0]) if len(operands) == 1 else operands
    named = parse(equation) if isinstance(equation, str) and len(given) == 2 else None
    stacks = [n for n, x in enumerate(given) if isinstance(x, Stack) and not isinstance(x.index, int)]
    if named is None or len(stacks) != 1:
        return None
    weight, x = given[stacks[0]], given[1 - stacks[0]]
    rows = named[1 - stacks[0]]
    found = expert_product(rows, named[stacks[0]], named[2])
    if found is None or found.transposed != weight.transposed or not isinstance(x, Tensor):
        return None
    x = x.permute([rows.index(letter) for letter in found.present + found.free + found.columns])
    for place, letter in enumerate(found.batch):
        x = x if letter in rows else x.unsqueeze(place)
    sizes, count = x.shape[len(found.batch) : -1], len(found.batch)
    y: Tensor | None = weight.matmul(x.reshape(*x.shape[:count], -1, x.shape[-1]))
    axes = found.batch + found.free + found.outputs
    if y is None:
        return None
    y = y.reshape(*y.shape[:count], *sizes, y.shape[-1])
    return y.permute([axes.index(letter) for letter in found.out])


PRODUCTS: dict[str, Callable[..., Tensor | None]] = {
    "linear": linear,
    **dict.fromkeys(("matmul", "mm", "bmm"), matmul),
    "einsum": einsum,
    "index_select": lambda x, axis, index: x[index] if isinstance(x, Stack) and axis == 0 else None,
    "__rmatmul__": lambda x, y: matmul(y, x),
    **dict.fromkeys(("_grouped_mm", "grouped_mm", "grouped_mm_fallback"), grouped),
}
