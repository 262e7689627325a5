"""Hadamard matrices of every common width are Kronecker products, and so have a fast transform.

A size `n = m · 2^k` takes a Paley matrix of order `m` times Sylvester's. If no Paley order fits, the odd factor takes
the discrete Hartley matrix, which is symmetric, orthogonal for every `n`, and has entries at most √2 times those of a
Hadamard matrix.
"""

from __future__ import annotations

import functools
import itertools

import numpy as np
import torch
from torch import Tensor

MAX_PALEY = 1024  # a dense factor above this costs more than it flattens


def hadamard_transform(x: Tensor, size: int, stride: int = 1) -> Tensor:
    """Return `x @ (H ⊗ I)` on blocks of the last axis, for an orthogonal `H` of order `size`.

    Source: QuaRot, arXiv 2404.00456, section 3.

    Args:
        x: [..., K], where K is a multiple of `size * stride`; the result is computed in its dtype.
        size: the order of `H`, any integer ≥ 1.
        stride: the order of the identity: 1 mixes neighbours; `head_dim` mixes the same channel of different heads.
    """
    if torch.compiler.is_compiling():
        a, b = (torch.tensor(constant_factor(size, n), dtype=torch.float64).to(x) for n in (0, 1))
    else:
        a, b = (factor.to(x) for factor in hadamard_factors(size))
    return kronecker_transform(x, a, b, stride)


@torch.compiler.assume_constant_result
def constant_factor(n: int, number: int) -> list[list[float]]:
    """Return one of the `hadamard_factors` to a compiler, which takes these numbers as constants."""
    rows: list[list[float]] = hadamard_factors(n)[number].tolist()
    return rows


def kronecker_transform(x: Tensor, a: Tensor, b: Tensor, stride: int = 1) -> Tensor:
    """Return `x @ (a ⊗ b ⊗ I_stride)` on blocks of the last axis, by two matmuls.

    These take K·(|a| + |b|) multiply-adds for each token, where |a| and |b| are the orders of a and b.
    """
    shape, (n, m) = x.shape, (a.shape[0], b.shape[0])
    blocks = shape[-1] // (n * m * stride)  # given explicitly, because an x without rows is legal
    x = a.T @ x.reshape(*shape[:-1], blocks, n, m * stride)
    if stride == 1:
        return (x @ b).reshape(shape)
    return (b.T @ x.reshape(*shape[:-1], blocks, n, m, stride)).reshape(shape)


@functools.cache
def hadamard_factors(n: int) -> tuple[Tensor, Tensor]:
    """Return two orthogonal float64 matrices of sizes near √n whose Kronecker product has order `n`."""
    odd = n // (n & -n)
    orders = [m for m in (odd << k for k in range((n // odd).bit_length())) if m <= MAX_PALEY and is_paley(m)]
    root = orders[0] if orders else odd
    a, rest = (paley(root) if orders else hartley(odd)), n // root
    while rest > 1 and a.shape[0] * 2 <= rest // 2:
        a, rest = np.kron(a, SYLVESTER), rest // 2
    b = np.ones((1, 1))
    while b.shape[0] < rest:
        b = np.kron(b, SYLVESTER)
    return normalized(a), normalized(b)


def normalized(h: np.ndarray) -> Tensor:
    """Return the matrix with rows scaled to length one."""
    return torch.from_numpy(h / np.linalg.norm(h[0]))


SYLVESTER = np.array([[1.0, 1.0], [1.0, -1.0]])


def hartley(n: int) -> np.ndarray:
    """Return the discrete Hartley matrix, cos + sin of 2π·jk/n (Hartley 1942; Bracewell 1983)."""
    angle = 2 * np.pi * (np.outer(np.arange(n), np.arange(n)) % n) / n
    return np.cos(angle) + np.sin(angle)


def is_paley(m: int) -> bool:
    """Return whether `paley(m)` exists; 1 counts, and 2 is left to Sylvester."""
    return m == 1 or (
        m % 4 == 0
        and (prime_power(m - 1) is not None or ((m // 2 - 1) % 4 == 1 and prime_power(m // 2 - 1) is not None))
    )


def paley(m: int) -> np.ndarray:
    """Return a Hadamard matrix of order `m` from the squares of a finite field (Paley 1933, constructions I and II)."""
    if m == 1:
        return np.ones((1, 1))
    if prime_power(m - 1):  # q ≡ 3 (mod 4): skew conference matrix plus the identity
        return conference(m - 1, -1) + np.eye(m)
    flip = np.array([[1.0, -1.0], [-1.0, -1.0]])
    return np.kron(conference(m // 2 - 1, 1), SYLVESTER) + np.kron(np.eye(m // 2), flip)


def conference(q: int, sign: int) -> np.ndarray:
    """Return C of order q + 1 with zero diagonal and C Cᵀ = q I, symmetric for `sign` 1 and skew for -1."""
    p, k = prime_power(q) or (q, 1)
    chi = quadratic_character(p, k)
    digits = np.arange(q)[:, None] // p ** np.arange(k) % p  # field elements as vectors over GF(p)
    difference = (digits[:, None] - digits[None]) % p @ p ** np.arange(k)
    C = np.zeros((q + 1, q + 1))
    C[0, 1:], C[1:, 0], C[1:, 1:] = 1, sign, chi[difference]
    return C


def quadratic_character(p: int, k: int) -> np.ndarray:
    """Return χ of GF(p^k), 0 at zero, 1 on squares and -1 elsewhere; elements are the digits of an integer in base p.

    Multiplying by a primitive element x walks through all q - 1 non-zero elements, with squares at even steps. x is a
    root of x^k = Σ c_i x^i for the first coefficients c for which that walk is long enough.
    """
    q = p**k
    for c in itertools.product(range(p), repeat=k):
        chi = np.zeros(q)
        element = [1] + [0] * (k - 1)
        for step in range(q - 1):
            index = sum(digit * p**i for i, digit in enumerate(element))
            if index == 0 or chi[index]:
                break
            chi[index] = 1 - 2 * (step % 2)
            top = element[-1]
            element = [(low + top * ci) % p for low, ci in zip([0, *element[:-1]], c, strict=True)]
        else:
            return chi
    raise AssertionError(f"GF({q}) has a primitive element")


def prime_power(q: int) -> tuple[int, int] | None:
    """Return (p, k) with q = p^k and p an odd prime, or None."""
    p = next((d for d in range(3, int(q**0.5) + 1, 2) if q % d == 0), q)
    k = next(k for k in itertools.count(1) if p**k >= q)
    return (p, k) if q > 2 and q % 2 and p**k == q else None
