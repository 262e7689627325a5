"""Activation sparsity: which input channels of linears can be left out for a token, and what that costs.

`python -m benchmarks.claims.sparsity [MODEL]` prints it for a float model. A channel is left out where its score is
below a threshold, a quantile of scores on calibration text. The score is |x_i| (magnitude), or |x_i| ‖W_:,i‖₂ as in
R-Sparse (arXiv 2504.19449), which has a product of low rank for the channels left out: y = W (x ⊙ m) + U_r S_r V_rᵀ
(x ⊙ (1 - m)). Of a sparsity s a share ρ of what is left goes to channels, K (1 - s) ρ of them, and the rest to the rank
r = (1 - s)(1 - ρ) N K / (N + K). The paper searches ρ by evolution; here each linear takes the best of a few.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks.claims.small_model import BOOKS, inputs, load, loss, weights

SHARES = (0.0, 0.5, 0.7, 0.8, 0.9, 0.95, 1.0)  # ρ
METHODS = {"magnitude": (1.0,), "scored": (1.0,), "rank": (0.0,), "mixed": SHARES}
SPARSITIES = (0.25, 0.5, 0.7)
SMALL = 0.01  # a squared output error, relative to the output, up to which a channel counts as one to leave out


class Sparse(NamedTuple):
    """What stands for a linear: the scale [K] of scores, the threshold, and the low-rank matrix [N, K]."""

    scale: Tensor
    threshold: float
    low_rank: Tensor
    share: float

    def product(self, x: Tensor, W: Tensor) -> Tensor:
        """Return y [..., N] of inputs x [..., K]."""
        kept = x.where(x.abs() * self.scale > self.threshold, 0)
        return kept @ W.T + (x - kept) @ self.low_rank.T


@functools.cache
def decomposed(directory: Path, path: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return U, S and Vᵀ of a linear's weight."""
    U, S, V = torch.linalg.svd(weights(directory)[path], full_matrices=False)
    return U, S, V


def sparse(directory: Path, path: str, sparsity: float, method: str, share: float) -> Sparse:
    """Return what stands for a linear with one share of channels."""
    x, W = inputs(directory)[path], weights(directory)[path]
    N, K = W.shape
    scale = torch.ones(K) if method == "magnitude" else W.norm(dim=0)
    scores = (x.abs() * scale).flatten()
    left_out = int(scores.numel() * (1 - (1 - sparsity) * share))
    threshold = float(scores.kthvalue(left_out).values) if left_out else -1.0
    U, S, V = decomposed(directory, path)
    rank = int((1 - sparsity) * (1 - share) * N * K / (N + K))
    return Sparse(scale, threshold, U[:, :rank] * S[:rank] @ V[:rank], share)


def error(directory: Path, path: str, found: Sparse) -> float:
    """Return ‖y - x Wᵀ‖² / ‖x Wᵀ‖² on the calibration rows."""
    x, W = inputs(directory)[path], weights(directory)[path]
    y = x @ W.T
    return float((found.product(x, W) - y).square().sum() / y.square().sum())


@functools.cache
def best(directory: Path, path: str, sparsity: float, method: str) -> tuple[Sparse, float]:
    """Return what stands for a linear with the share of least error, and that error."""
    made = (sparse(directory, path, sparsity, method, share) for share in METHODS[method])
    return min(((found, error(directory, path, found)) for found in made), key=lambda pair: pair[1])


def mean_error(sparsity: float, method: str, directory: Path = BOOKS) -> float:
    """Return the error averaged over all linears."""
    errors = [best(directory, path, sparsity, method)[1] for path in weights(directory)]
    return sum(errors) / len(errors)


def standing_in(found: Sparse, W: Tensor) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
    """Return a hook that puts a sparse product in the place of a linear's."""

    def hook(module: nn.Module, x: tuple[Tensor, ...], _: Tensor) -> Tensor:
        bias: Any = module.bias
        return found.product(x[0], W) + (0 if bias is None else bias)

    return hook


@contextmanager
def sparsified(sparsity: float, method: str, directory: Path = BOOKS) -> Iterator[None]:
    """Leave channels out in all linears until the `with` block ends."""
    with ExitStack() as hooks:
        for path, W in weights(directory).items():
            module, found = load(directory).get_submodule(path), best(directory, path, sparsity, method)[0]
            hooks.enter_context(module.register_forward_hook(standing_in(found, W)))
        yield


def increase(sparsity: float, method: str, directory: Path = BOOKS, count: int = 2) -> float:
    """Return how much the loss grows, in nats per token."""
    with sparsified(sparsity, method, directory):
        found = loss(directory, count)
    return found - loss(directory, count)


def skippable(directory: Path, path: str) -> float:
    """Return the largest of some sparsities at which the R-Sparse score alone keeps the error below `SMALL`."""
    grid = [step / 10 for step in range(1, 10)]
    return max((s for s in grid if best(directory, path, s, "scored")[1] <= SMALL), default=0.0)


def main() -> None:
    """Print errors by kind of linear, and losses of the whole model."""
    directory = Path(sys.argv[1]) if len(sys.argv) > 1 else BOOKS
    kinds: dict[str, list[str]] = {}
    for path in weights(directory):
        kinds.setdefault(path.rpartition(".")[2], []).append(path)
    table = Table("linears", f"channels left out at {SMALL:.0%} error", box=SIMPLE_HEAD, pad_edge=False)
    for method in METHODS:
        table.add_column(f"error at 50 %: {method}")
    table.add_column("ρ")
    for kind, paths in kinds.items():
        found = {method: [best(directory, path, 0.5, method) for path in paths] for method in METHODS}
        part = sum(skippable(directory, path) for path in paths) / len(paths)
        cells = [f"{sum(e for _, e in each) / len(each):.4f}" for each in found.values()]
        share = sum(each.share for each, _ in found["mixed"]) / len(paths)
        table.add_row(kind, f"{part:.0%}", *cells, f"{share:.2f}")
    Console().print(table)
    table = Table("left out", *METHODS, box=SIMPLE_HEAD, pad_edge=False, title="increase of the loss, nats per token")
    for sparsity in SPARSITIES:
        cells = [f"{increase(sparsity, method, directory, 4):+.4f}" for method in METHODS]
        table.add_row(f"{sparsity:.0%}", *cells)
    Console().print(table)


if __name__ == "__main__":
    main()
