"""Some rows of what reaches a linear belong to the prefix, the tokens that stand in front of every sequence."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from quantize.errors import QuantizeError


@dataclass
class PrefixTokens:
    """The prefix of every sequence, whose activations are not quantized (PrefixQuant, arXiv 2410.05265, section 4).

    Attributes:
        tokens: the ids of the prefix; () for none.
        shape: the number of sequences that run, and of tokens in each, prefix included; None if one sequence runs, so
            that all rows are its tokens.
        absent: whether no prefix stands in front now, because a KV cache holds it.
    """

    tokens: tuple[int, ...] = ()
    shape: tuple[int, int] | None = None
    absent: bool = False

    @property
    def runs(self) -> bool:
        """Whether the forward pass that runs has a prefix."""
        return bool(self.tokens) and not self.absent

    def in_front(self, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the inputs [B, T] of token ids as they run; without a prefix they stay as they are."""
        return {name: self.prepended(ids) if self.tokens else ids for name, ids in given.items()}

    def prepended(self, ids: Tensor) -> Tensor:
        """Complete ids to sequences that begin with the prefix: int64 [B, T] → [B, m + T], m of `missing`."""
        return torch.cat([ids.new_tensor(self.tokens[: self.missing(ids)]).expand(len(ids), -1), ids], dim=1)

    def missing(self, ids: Tensor) -> int:
        """Return how many tokens must stand in front of ids [B, T] so that they begin with the prefix, 0 to p.

        Ids that begin with the prefix, or with the end of it, such as the token that begins a text, are not given these
        tokens twice. That counts only if all sequences of a batch do, as each gets equally many tokens in front.
        """
        p = len(self.tokens)
        ends = (k for k in range(min(p, ids.shape[1]), 0, -1) if self.ends_with(ids[:, :k]))
        return p - next(ends, 0)

    def ends_with(self, first: Tensor) -> bool:
        """Return whether the last tokens of the prefix are the given ones, [B, k], in all sequences."""
        return bool((first == first.new_tensor(self.tokens[-first.shape[1] :])).all())

    def batches(self, given: Iterable[Mapping[str, Tensor]]) -> list[dict[str, Tensor]]:
        """Return batches with the prefix in front, then with one sequence each, whose first p rows are the prefix."""
        if not self.tokens:
            return [dict(batch) for batch in given]
        rows = [dict(zip(batch, row, strict=True)) for batch in given for row in zip(*split(batch), strict=True)]
        return [self.in_front(row) for row in rows]

    def rest(self, x: Tensor) -> Tensor:
        """Return the rows [rows, K] of x [..., K] behind the prefix; x itself if there is no prefix."""
        return self._sequences(x)[:, len(self.tokens) :].flatten(0, 1) if self.runs else x

    def apart(self, x: Tensor, first: Callable[[Tensor], Tensor], rest: Callable[[Tensor], Tensor]) -> Tensor:
        """Apply `first` to the prefix's rows and `rest` to all others: [..., K] → [..., N]."""
        if not self.runs:
            return rest(x)
        rows, p = self._sequences(x), len(self.tokens)
        if rows.shape[1] == p:
            return first(x)
        y = torch.cat([first(rows[:, :p]), rest(rows[:, p:])], dim=1)
        return y.reshape(*x.shape[:-1], y.shape[-1])

    def _sequences(self, x: Tensor) -> Tensor:
        """Return [B, T, K], or [B * T, K] as some models flatten it, as [B, T, K].

        Raises:
            QuantizeError: the rows are not the tokens.
        """
        rows = x.shape[:-1].numel()
        batch, length = self.shape or (1, rows)
        if rows != batch * length:
            raise QuantizeError(f"a linear runs on {rows} rows, which are not the tokens of {batch} × {length}")
        return x.reshape(batch, length, x.shape[-1])


def split(batch: Mapping[str, Tensor]) -> list[tuple[Tensor, ...]]:
    """Split each input into single samples."""
    return [tensor.split(1) for tensor in batch.values()]
