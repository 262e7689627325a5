"""The least time of GPTQ on this machine is that of its necessary steps, each by the fastest code that is known."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.linalg.blas import ssyrk
from scipy.linalg.lapack import spotrf
from torch import Tensor
from transformers import AutoModel

from benchmarks.machine import best_of
from quantize.calibration.data import BATCH_TOKENS
from quantize.calibration.precision import calibration_dtype
from quantize.quantizers import hessian
from quantize.quantizers.column_rounding import QParams, round_columns
from quantize.scheme.scheme import WeightArgs

REPEATS = 3
DTYPE = calibration_dtype([torch.bfloat16], torch.device("cpu"))  # of operands, for a model stored in bfloat16
GROUP = 128  # columns that share a scale
Row = dict[str, Any]


def forward(model: str, ids: Tensor) -> float:
    """Return seconds of transformers' forward pass over tokens [n, length] without the last layer, which is unused."""
    loaded = AutoModel.from_pretrained(model, dtype=DTYPE)
    batch, layers = ids[: max(1, BATCH_TOKENS // ids.shape[1])], loaded.config.num_hidden_layers
    with torch.no_grad():
        seconds: float = best_of(lambda: loaded(batch, use_cache=False), REPEATS)
    rest: float = (layers - 1) / layers
    return seconds * len(ids) / len(batch) * rest


def gram(x: Tensor) -> float:
    """Return seconds of xᵀx, half of which must be computed: by BLAS, or by torch with operands that may be rounded."""
    half, columns = np.zeros((x.shape[1], x.shape[1]), np.float32, order="F"), x.numpy().T
    rounded = x.to(DTYPE)
    by_blas = partial(ssyrk, 1.0, columns, beta=1.0, c=half, overwrite_c=1)
    return fastest(by_blas, halves=partial(torch.mm, rounded.T, rounded))


def factor(H: Tensor) -> float:
    """Return seconds of the factor of a symmetric H [K, K]: by LAPACK, by torch, or by our code with damping."""
    by_lapack = partial(spotrf, np.asfortranarray(H.numpy()), clean=0)
    return fastest(by_lapack, partial(torch.linalg.cholesky, H), lambda: hessian.factor(H.clone(), 0.01, H.device))


def feedback(H: Tensor, rows: int) -> float:
    """Return seconds of a product of errors [rows, K] with the part above the diagonal of H [K, K]."""
    H = H.to(DTYPE)
    errors = torch.randn(rows, len(H), generator=torch.Generator().manual_seed(0)).to(H)
    return fastest(halves=partial(torch.mm, errors, H))


def columns(K: int, rows: int) -> float:
    """Return seconds of rounding K columns of [rows, K] in turn by our code, because no library does it."""
    generator, block = torch.Generator().manual_seed(0), min(GROUP, K)
    W, scale = torch.randn(block, rows, generator=generator), torch.full((block, rows), 0.3)
    grid = QParams(scale, None, WeightArgs(num_bits=4, group_size=block))
    influence = 0.01 * torch.randn(block, block, generator=generator)
    return fastest(lambda: round_columns(W.clone(), W.clone(), influence, grid)) * K / block


def fastest(*runs: Callable[[], object], halves: Callable[[], object] | None = None) -> float:
    """Return the seconds of the fastest run; half of them for `halves`, which computes twice what is needed."""
    found = [best_of(run, REPEATS) for run in runs]
    return min([*found, best_of(halves, REPEATS) / 2] if halves else found)


def layer(config: Row, tokens: int) -> dict[str, float]:
    """Return seconds of each step but the forward pass in a layer of a Llama, whose linears share four inputs."""
    d, f = config["hidden_size"], config["intermediate_size"]
    kv = d // config["num_attention_heads"] * config["num_key_value_heads"]
    found = dict.fromkeys(("Gram matrices", "factors", "error feedback", "columns"), 0.0)
    for K, rows in ((d, d + 2 * kv), (d, d), (d, 2 * f), (f, d)):
        x = torch.randn(tokens, K, generator=torch.Generator().manual_seed(0))
        H = x.T @ x + tokens * torch.eye(K)
        found["Gram matrices"] += gram(x)
        found["error feedback"] += feedback(H, rows)
        found["factors"] += factor(H)
        found["columns"] += columns(K, rows)
    return found


def main(model: str, tokens: str) -> None:
    """Print the seconds of each step for a whole model, as JSON."""
    ids = torch.tensor([json.loads(line)["input_ids"] for line in Path(tokens).read_text().splitlines()])
    config = json.loads((Path(model) / "config.json").read_text())
    steps = layer(config, ids.numel())
    found = {name: seconds * config["num_hidden_layers"] for name, seconds in steps.items()}
    print(json.dumps({"forward pass": forward(model, ids), **found}))


def verdict(rows: list[Row], peer: str) -> str:
    """Return which part of the peer's time plain GPTQ takes, and what bounds it; an empty text without the peer."""
    deepest = max(row["layers"] for row in rows)
    runs = {row["method"]: row for row in rows if row["layers"] == deepest}
    if not {peer, "gptq-plain", "rtn"} <= runs.keys():
        return ""
    ours, theirs, rounding = runs["gptq-plain"], runs[peer], runs["rtn"]["seconds"]
    time_part, memory_part = (ours[name] / theirs[name] for name in ("seconds", "peak_mb"))
    steps = ", ".join(f"{name} {seconds:.0f}" for name, seconds in ours["bound"].items())
    least = rounding + sum(ours["bound"].values())
    return (
        f"At {deepest} layers `gptq-plain` takes {time_part:.0%} of the time and {memory_part:.0%} of the memory of "
        f"{peer}.\n"
        f"Steps that no GPTQ goes without take, each alone, the best of {REPEATS} runs of the fastest of transformers, "
        f"torch, BLAS, LAPACK and what is done here, so many seconds: {steps}. With the "
        f"{rounding:.0f} of a run that only rounds, which opens, verifies and writes: {least:.0f}, or "
        f"{least / theirs['seconds']:.0%} of the peer's time.\n"
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
