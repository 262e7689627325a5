"""Claims on KV caches of few bits: OSCAR, KVarN and CQ beside plain rounding and a Hadamard matrix.

`python -m benchmarks.claims.kv_cache_claims` prints the KL divergence that each costs books-llama-6m.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from benchmarks.claims.claim import Claim
from benchmarks.claims.coupled import coupled
from benchmarks.claims.kv_cache import Change, divergence, per_token
from benchmarks.claims.kvarn import kvarn
from benchmarks.claims.oscar import CLIPPED, oscar

SETTINGS: dict[str, Callable[[], Change]] = {}
for bits in ((4, 4), (4, 2), (2, 2)):
    label = f"K{bits[0]} V{bits[1]}"
    SETTINGS[f"{label}, each token"] = functools.partial(per_token, bits)
    SETTINGS[f"{label}, Hadamard"] = functools.partial(per_token, bits, rotate=True)
    SETTINGS[f"{label}, KVarN"] = functools.partial(kvarn, bits)
    SETTINGS[f"{label}, KVarN without its scales"] = functools.partial(kvarn, bits, balanced=False)
for both in (4, 2):
    label = f"K{both} V{both}, clipped"
    SETTINGS[f"{label}, each token"] = functools.partial(per_token, (both, both), CLIPPED)
    SETTINGS[f"{label}, Hadamard"] = functools.partial(per_token, (both, both), CLIPPED, rotate=True)
    SETTINGS[f"{label}, OSCAR"] = functools.partial(oscar, both)
    SETTINGS[f"{label}, OSCAR for each layer"] = functools.partial(oscar, both, each_head=False)
for channels, code in ((2, 4), (1, 1), (8, 8)):
    SETTINGS[f"CQ-{channels}c{code}b"] = functools.partial(coupled, channels, code)
SETTINGS["CQ-8c8b, even weights"] = functools.partial(coupled, 8, 8, fisher=False)


@functools.cache
def kl(name: str) -> float:
    """Return the divergence of one setting."""
    return divergence(SETTINGS[name]())


def claim(name: str, paper: str, factor: float, holds: bool, left: str, right: str) -> Claim:
    """Return a claim on the divergences of two settings."""
    return Claim(name, paper, factor, holds, lambda: (kl(left), kl(right)))


CLAIMS: Sequence[Claim] = (
    claim(
        "OSCAR ≤ 0.9 a Hadamard matrix (2 bits, KL)", "2605.17757", 0.9, True,
        "K2 V2, clipped, OSCAR", "K2 V2, clipped, Hadamard",
    ),
    claim(
        "OSCAR ≤ 0.9 a Hadamard matrix (4 bits, KL)", "2605.17757", 0.9, True,
        "K4 V4, clipped, OSCAR", "K4 V4, clipped, Hadamard",
    ),
    claim(
        "OSCAR for each head ≤ 0.9 for each layer (2 bits, KL)", "2605.17757", 0.9, False,
        "K2 V2, clipped, OSCAR", "K2 V2, clipped, OSCAR for each layer",
    ),
    claim(
        "KVarN ≤ 0.9 a Hadamard matrix (K4 V4, KL)", "2606.03458", 0.9, True, "K4 V4, KVarN", "K4 V4, Hadamard",
    ),
    claim(
        "KVarN ≤ 0.9 a Hadamard matrix (K4 V2, KL)", "2606.03458", 0.9, False, "K4 V2, KVarN", "K4 V2, Hadamard",
    ),
    claim(
        "KVarN's scales ≤ 0.9 its tiles without them (K2 V2, KL)", "2606.03458", 0.9, False,
        "K2 V2, KVarN", "K2 V2, KVarN without its scales",
    ),
    claim("CQ-8c8b ≤ ½ CQ-1c1b (1 bit a channel, KL)", "2405.03917", 0.5, True, "CQ-8c8b", "CQ-1c1b"),
    claim(
        "CQ-8c8b, 1 bit a channel, ≤ a Hadamard matrix, 2 bits (KL)", "2405.03917", 0.95, True,
        "CQ-8c8b", "K2 V2, Hadamard",
    ),
    claim(
        "CQ-2c4b ≤ ½ a Hadamard matrix (2 bits a channel, KL)", "2405.03917", 0.5, True,
        "CQ-2c4b", "K2 V2, Hadamard",
    ),
    claim(
        "CQ by Fisher's weights ≤ 0.9 by even ones (8c8b, KL)", "2405.03917", 0.9, False,
        "CQ-8c8b", "CQ-8c8b, even weights",
    ),
)  # fmt: skip


def main() -> None:
    """Print one table."""
    table = Table("cache", "KL", box=SIMPLE_HEAD, pad_edge=False)
    for name in SETTINGS:
        table.add_row(name, f"{kl(name):.4f}")
    Console().print(table)


if __name__ == "__main__":
    main()
