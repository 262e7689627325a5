"""Which rows of what reaches a linear belong to the tokens that stand in front of every sequence."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from quantize.errors import QuantizeError


@dataclass
class PrefixTokens:
    """The prefix of every sequence (PrefixQuant, arXiv 2410.05265, section 4): its activations are not quantized.

    Attributes:
        tokens: its ids; () for none.
        shape: sequences of the pass that runs, and tokens of each, with the prefix; None where one sequence runs, so
            that all rows are its tokens.
        absent: no prefix stands in front, as a KV cache holds it.
    """

    tokens: tuple[int, ...] = ()
    shape: tuple[int, int] | None = None
    absent: bool = False

    @property
    def runs(self) -> bool:
        """Whether the pass that runs has a prefix."""
        return bool(self.tokens) and not self.absent

    def in_front(self, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The inputs [B, T] of token ids as [B, p + T]; as they are if there is no prefix."""
        return {name: self.prepended(ids) if self.tokens else ids for name, ids in given.items()}

    def prepended(self, ids: Tensor) -> Tensor:
        """int64 [B, T] → [B, p + T]."""
        return torch.cat([ids.new_tensor(self.tokens).expand(len(ids), -1), ids], dim=1)

    def batches(self, given: Iterable[Mapping[str, Tensor]]) -> list[dict[str, Tensor]]:
        """Batches of inputs with the prefix in front; then one sequence each, whose first p rows are the prefix."""
        if not self.tokens:
            return [dict(batch) for batch in given]
        rows = [dict(zip(batch, row, strict=True)) for batch in given for row in zip(*split(batch), strict=True)]
        return [self.in_front(row) for row in rows]

    def rest(self, x: Tensor) -> Tensor:
        """[..., K] → the rows [rows, K] behind the prefix; x itself where there is none."""
        return self._sequences(x)[:, len(self.tokens) :].flatten(0, 1) if self.runs else x

    def apart(self, x: Tensor, first: Callable[[Tensor], Tensor], rest: Callable[[Tensor], Tensor]) -> Tensor:
        """[..., K] → [..., N]: `first` of the prefix's rows, `rest` of all others."""
        if not self.runs:
            return rest(x)
        rows, p = self._sequences(x), len(self.tokens)
        y = torch.cat([first(rows[:, :p]), rest(rows[:, p:])], dim=1)
        return y.reshape(*x.shape[:-1], y.shape[-1])

    def _sequences(self, x: Tensor) -> Tensor:
        """[B, T, K], or [B * T, K] as some models flatten it, as [B, T, K].

        Raises:
            QuantizeError: the rows are not the tokens.
        """
        rows = x.shape[:-1].numel()
        batch, length = self.shape or (1, rows)
        if rows != batch * length:
            raise QuantizeError(f"a linear runs on {rows} rows, which are not the tokens of {batch} × {length}")
        return x.reshape(batch, length, x.shape[-1])


def split(batch: Mapping[str, Tensor]) -> list[tuple[Tensor, ...]]:
    """Each input sample by sample."""
    return [tensor.split(1) for tensor in batch.values()]
