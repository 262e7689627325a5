"""Statistics are accumulators over the rows of an activation, which can be merged."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Protocol, Self

import torch
from torch import Tensor

from quantize.calibration.gram_sums import add_products, fill_lower, gram_factors
from quantize.errors import shown


class Statistic(Protocol):
    """An accumulator over activations [..., K]; after `a.merge(b)`, a is as if it had seen the data of both."""

    def update(self, x: Tensor) -> None:
        """Take in one batch of activations."""

    def merge(self, other: Self) -> None:
        """Take in what another accumulator has seen."""

    def check(self) -> int | None:
        """Check that this can have been seen; return K, or None if nothing was seen.

        Raises:
            ValueError: it cannot; the message names the tensor and the value.
        """


@dataclass
class Absmax:
    """The largest magnitude of each channel, `value` [K] ≥ 0."""

    value: Tensor | None = None

    def update(self, x: Tensor) -> None:
        """Take in [..., K]."""
        largest = x.detach().abs().reshape(-1, x.shape[-1]).amax(dim=0)
        self.value = largest if self.value is None else torch.maximum(self.value, largest)

    def merge(self, other: Self) -> None:
        """Take the larger of both magnitudes."""
        if other.value is not None:
            self.update(other.value)

    def check(self) -> int | None:
        """Check that magnitudes are finite and not negative."""
        return None if self.value is None else check_numbers("absmax", self.value, 1, least=0.0).shape[0]


@dataclass
class Gram:
    """Sums of outer products over `rows` rows.

    Attributes:
        value: Σ xᵀx [K, K]; GPTQ's Hessian is twice it.
        drift: Σ (x' - x)ᵀ x [K, K], where x' is what x would be in the float model; None if x' was not given.
    """

    value: Tensor | None = None
    rows: int = 0
    drift: Tensor | None = None

    def update(self, x: Tensor, float_reference: Tensor | None = None, dtype: torch.dtype = torch.float32) -> None:
        """Take in x [..., K], and x' of the same shape, rounded to `dtype`; sums are in float32."""
        lefts, x = gram_factors(x, float_reference, dtype)
        totals = self.totals(x.shape[1], len(lefts), x.device)
        add_products(totals, lefts, x, self.rows)
        fill_lower(totals[0])
        self.rows += len(x)

    def totals(self, K: int, count: int, device: torch.device) -> list[Tensor]:
        """Return `value` and, for a `count` of two, `drift`; they are zeros if nothing was seen."""
        if self.value is None:
            self.value = torch.zeros(K, K, device=device)
        if self.drift is None and count > 1:
            self.drift = torch.zeros(K, K, device=device)
        return [self.value] if self.drift is None else [self.value, self.drift]

    def merge(self, other: Self) -> None:
        """Add the sums of both."""
        if other.value is not None:
            self.value = other.value if self.value is None else self.value.add_(other.value)
        if other.drift is not None:
            self.drift = other.drift if self.drift is None else self.drift.add_(other.drift)
        self.rows += other.rows

    def check(self) -> int | None:
        """Check that the sums are finite square matrices of as many channels."""
        if type(self.rows) is not int or self.rows < 0:
            raise ValueError(f"rows is {shown(self.rows)}, which is no number of rows")
        shapes = {check_numbers("a sum", x, 2).shape for x in (self.value, self.drift) if x is not None}
        if len({size for shape in shapes for size in shape}) > 1:
            raise ValueError(f"a sum has the shape {list(max(shapes))}, which is not square")
        return next(iter(shapes))[0] if shapes else None


@dataclass
class Rows:
    """A sample of rows, and the largest magnitude of each channel over all rows.

    The sample holds the `LIMIT` rows of smallest digest, so it does not depend on the order in which data come, and
    merging gives what one accumulator would have seen. Equal rows count each time they come.

    Attributes:
        value: float32 [rows ≤ LIMIT, K].
        absmax: [K] ≥ 0.
    """

    LIMIT: ClassVar[int] = 512
    value: Tensor | None = None
    absmax: Absmax = field(default_factory=Absmax)

    def update(self, x: Tensor) -> None:
        """Take in [..., K]; an activation without rows changes nothing."""
        if not x.numel():
            return
        self.absmax.update(x)
        rows = x.detach().reshape(-1, x.shape[-1]).float()
        rows = rows if self.value is None else torch.cat([self.value, rows])
        self.value = rows[digests(rows).argsort(stable=True)[: self.LIMIT]]

    def merge(self, other: Self) -> None:
        """Keep the rows of smallest digest of both."""
        if other.value is not None:
            self.update(other.value)
            self.absmax.merge(other.absmax)

    def check(self) -> int | None:
        """Check that the sample is of finite rows, and the magnitudes of as many channels."""
        if not isinstance(self.absmax, Absmax):
            raise ValueError(f"absmax is {shown(self.absmax)}, which is no statistic")
        columns = self.absmax.check()
        shape = (0, columns) if self.value is None else check_numbers("a row", self.value, 2).shape
        if shape[1] != columns or shape[0] > self.LIMIT:
            raise ValueError(f"there are rows {list(shape)} beside the magnitudes of {columns} channels")
        if self.value is not None and self.value.dtype != torch.float32:
            raise ValueError(f"the rows are of {self.value.dtype}, and digests are those of torch.float32")
        return columns


def check_numbers(what: str, x: object, dim: int, least: float = -torch.inf) -> Tensor:
    """Return a floating-point tensor of `dim` axes, none of them empty, whose numbers are finite and at least `least`.

    Raises:
        ValueError: it is none; the message names the first wrong value.
    """
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.dim() != dim or not x.numel():
        raise ValueError(f"{what} is {f'{list(x.shape)} of {x.dtype}' if isinstance(x, Tensor) else shown(x)}")
    wrong = ~(x.isfinite() & (x >= least))
    if bool(wrong.any()):
        index = wrong.nonzero()[0].tolist()
        raise ValueError(f"{what} holds {float(x[tuple(index)])} at {index}")
    return x


def digests(rows: Tensor) -> Tensor:
    """Return a digest, int64 [n], of each row of float32 [n, K], evenly spread, from the row's bits alone."""
    bits = rows.contiguous().view(torch.int32).long()
    odd = torch.arange(1, 2 * rows.shape[1], 2, device=rows.device) * 0x9E3779B1
    mixed = (bits * odd).sum(-1) * 0x5851F42D4C957F2D
    return (mixed ^ (mixed >> 29)) * 0x14057B7EF767814F
