"""Claims of papers on formats and codebooks are inequalities, measured on synthetic data from seeded generators.

These are measurements, not features: a claim that does not hold here stays in the table, marked as such.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from benchmarks.claims import codebooks
from benchmarks.claims.claim import Claim, Measure
from benchmarks.claims.codebooks import dint4, min_max, nearest, powers, scaled, tlq, uniform
from benchmarks.claims.synthetic import expert_pruning, kmeans_error, sparse_error
from quantize.kernels.fp4 import quantize_fp4
from quantize.kernels.hadamard import hadamard_transform
from quantize.kernels.ops import dequantize, quantize_per_token

GROUPS = {"mxfp4": 32, "nvfp4": 16, "int": 32}
POST, POT = partial(powers, base=2**0.5), partial(powers, base=2.0)


def sample(kind: str, rows: int = 32, columns: int = 1024, seed: int = 0) -> Tensor:
    """Draw float32 [rows, columns] from a `gaussian`, `laplace` or `student5` distribution."""
    rng = torch.Generator().manual_seed(seed)
    normal = torch.randn(6, rows, columns, generator=rng)
    uniform = torch.rand(rows, columns, generator=rng).clamp(min=1e-7)
    return {
        "gaussian": normal[0],
        "laplace": -uniform.log() * normal[0].sign(),
        "student5": normal[0] / normal[1:].square().mean(dim=0).sqrt(),
    }[kind]


def dint4_zeros() -> tuple[float, float]:
    """Return the share of weights rounded to zero by dINT4 and by INT4, in groups of 128 scaled to the largest."""
    W = sample("laplace").reshape(-1, 128)
    left, right = (nearest(W, next(scaled(W, levels, [1.0]))) == 0 for levels in (dint4(), uniform(4)))
    return float(left.float().mean()), float(right.float().mean())


def dint4_error() -> tuple[float, float]:
    """Return the errors of dINT4 and INT4 in such groups."""
    W = sample("laplace").reshape(-1, 128)
    left, right = (codebooks.error(W, scaled(W, levels, [1.0])) for levels in (dint4(), uniform(4)))
    return left, right


def tlq_against(kind: str, bits: int, clipped: bool) -> Measure:
    """Compare TLQ with a uniform grid, either from the smallest to the largest value or clipped to the least error."""

    def measure() -> tuple[float, float]:
        W = sample(kind)
        other = scaled(W, uniform(bits)) if clipped else min_max(W, bits)
        return codebooks.error(W, tlq(W, bits)), codebooks.error(W, other)

    return measure


def post_against(other: Callable[[int], Tensor], kind: str, bits: int) -> Measure:
    """Compare POST's powers of √2 with other levels of as many bits, each with the scale of least error."""

    def measure() -> tuple[float, float]:
        W = sample(kind)
        left, right = (codebooks.error(W, scaled(W, levels(bits))) for levels in (POST, other))
        return left, right

    return measure


def coupling(correlated: bool) -> Measure:
    """Compare one code of 8 bits for 8 channels with one of 1 bit for each channel, by the error on unseen tokens."""
    return lambda: (kmeans_error(8, 8, correlated), kmeans_error(1, 1, correlated))


def format_error(x: Tensor, name: str, hadamard: bool) -> float:
    """Return the relative squared error of a format, with or without a rotation by Hadamard blocks of 32."""
    rotated = hadamard_transform(x.reshape(-1, 32), 32).reshape(x.shape) if hadamard else x
    if name == "int":
        q, scale, _ = quantize_per_token(rotated.reshape(-1, GROUPS[name]), 4, symmetric=True)
    else:
        q, scale = quantize_fp4(rotated, name, GROUPS[name])
    return float((dequantize(q, scale, None).reshape(x.shape) - rotated).square().sum() / x.square().sum())


def formats(rotated: str, other: str) -> Measure:
    """Compare a format in rotated coordinates with one in the given coordinates, on heavy tails."""

    def measure() -> tuple[float, float]:
        x = sample("laplace", rows=64)
        return format_error(x, rotated, hadamard=True), format_error(x, other, hadamard=False)

    return measure


def sparse_and_low_rank() -> tuple[float, float]:
    """Return the errors of the best mix of kept channels and low rank, and of the better of either alone."""
    errors = {share: sparse_error(share) for share in (0.0, 0.7, 0.8, 0.9, 1.0)}
    return min(errors[share] for share in (0.7, 0.8, 0.9)), min(errors[0.0], errors[1.0])


CLAIMS: Sequence[Claim] = (
    Claim(
        "dINT4 rounds fewer weights to zero than INT4 (Laplace, groups of 128)", "2311.05161", 0.7, True, dint4_zeros
    ),
    Claim("dINT4 has less error than INT4 (Laplace, groups of 128)", "2311.05161", 0.9, True, dint4_error),
    Claim("TLQ < min-max uniform (Gaussian, 3 bits)", "2508.03485", 0.9, True, tlq_against("gaussian", 3, False)),
    Claim("TLQ < min-max uniform (Gaussian, 4 bits)", "2508.03485", 0.9, True, tlq_against("gaussian", 4, False)),
    Claim("TLQ < clipped uniform (Gaussian, 3 bits)", "2508.03485", 1.0, False, tlq_against("gaussian", 3, True)),
    Claim("TLQ < clipped uniform (Student 5, 4 bits)", "2508.03485", 0.9, True, tlq_against("student5", 4, True)),
    Claim("POST < powers of two (Gaussian, 4 bits)", "2504.17263", 0.5, True, post_against(POT, "gaussian", 4)),
    Claim("POST < uniform (Laplace, 4 bits)", "2504.17263", 0.9, True, post_against(uniform, "laplace", 4)),
    Claim("POST < powers of two (Gaussian, 3 bits)", "2504.17263", 1.0, False, post_against(POT, "gaussian", 3)),
    Claim("POST < uniform (Gaussian, 3 bits)", "2504.17263", 1.0, False, post_against(uniform, "gaussian", 3)),
    Claim("CQ: 8 channels, 8 bits ≤ ½ of 1 channel, 1 bit (correlated)", "2405.03917", 0.5, True, coupling(True)),
    Claim("CQ: 8 channels, 8 bits ≤ ½ of 1 channel, 1 bit (independent)", "2405.03917", 0.5, False, coupling(False)),
    Claim("R-Sparse: a mix < channels alone and rank alone", "ICLR 2025", 0.7, True, sparse_and_low_rank),
    Claim("Hadamard blocks help MXFP4 (Laplace)", "2509.23202", 0.9, True, formats("mxfp4", "mxfp4")),
    Claim("Hadamard blocks help NVFP4 (Laplace)", "2509.23202", 1.0, False, formats("nvfp4", "nvfp4")),
    Claim("Hadamard blocks help INT4 in groups of 32 (Laplace)", "2509.23202", 0.7, True, formats("int", "int")),
    Claim("INT4 in groups of 32 with Hadamard ≈ NVFP4 (Laplace)", "2509.23202", 1.1, True, formats("int", "nvfp4")),
    Claim("REAP < pruning experts by frequency", "2510.13999", 1.0, False, expert_pruning),
)
