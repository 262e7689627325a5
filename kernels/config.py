"""A configuration says how a kernel is tiled; a table that is shipped has one for each shape of product.

`configs.json` has rows of a shape and its configuration, by architecture and scheme. Nothing is tuned while serving.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from math import gcd, log
from pathlib import Path
from typing import Any

import torch

TABLE = Path(__file__).with_name("configs.json")
TOKEN_TILES = 4  # the most of a product that is split
LARGEST_STEP, SMALLEST_STEP = 128, 16  # columns of a dot product in floating point
LARGEST_PANEL = 128  # columns that one launch rounds in turn, whose errors a program holds in registers
LARGEST_K = 1 << 15  # int32 holds 255 · 255 · K, and 16 · 15 · 255 · K: integers of 8, or 4 and 8 bits, as `shift` sums
ON_CPU, ON_AMD = "interpreter", "gfx942"


@dataclass(frozen=True)
class Config:
    """Tile and launch parameters.

    Attributes:
        block_m: the tokens of a tile.
        block_n: the output channels of a tile.
        block_k: the columns of an iteration, a multiple of 128; products in groups take as many groups as they are.
        split_k: the number of parts of the columns, each of which is one program's.
        num_warps: the warps of a program.
        num_stages: the stages of the pipeline of loads.
        max_registers: the registers of a thread on NVIDIA, so that more programs fit beside each other; 0 leaves this
            to the compiler.
        variant: how 4-bit weights become operands: `shift`, `mask` or `pair`; `bytes` for 8-bit weights.
        asm: whether 4-bit weights are unpacked in inline assembly (NVIDIA) or in plain Triton, which the interpreter
            runs.
    """

    block_m: int = 16
    block_n: int = 64
    block_k: int = 128
    split_k: int = 1
    num_warps: int = 4
    num_stages: int = 4
    max_registers: int = 0
    variant: str = "shift"
    asm: bool = False

    def options(self) -> dict[str, int | bool]:
        """Return options of Triton's compiler, which fuses no sums of products, so results are the reference's."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": False}
        return options | ({"maxnreg": self.max_registers} if self.max_registers else {})


def architecture(device: torch.device) -> str:
    """Return `sm_90`, `gfx942`, ..., or `interpreter` for a CPU."""
    if device.type != "cuda":
        return ON_CPU
    properties = torch.cuda.get_device_properties(device)
    name = str(getattr(properties, "gcnArchName", "")).split(":")[0]
    return name if torch.version.hip else f"sm_{properties.major}{properties.minor}"


@cache
def read_table() -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Read `configs.json`."""
    table: dict[str, dict[str, list[dict[str, Any]]]] = json.loads(TABLE.read_text())
    return table


@lru_cache(maxsize=4096)
def choose_config(M: int, N: int, K: int, scheme: str, arch: str) -> Config:
    """Return the configuration of the nearest shape in the table, made to fit.

    Args:
        M: the number of tokens.
        N: the number of output channels.
        K: the number of columns as stored, in whole blocks of 128.
        scheme: `w8a8`, `w4a8` or `w4a4`; `w8a8g` and `w4a8g` for weights in groups; `w4a16`.
        arch: what `architecture` returns; one that is not in the table takes the rows of the next older one.
    """
    rows = read_table()[nearest_architecture(arch)][scheme]
    row = dict(min(rows, key=lambda row: shape_distance(row["shape"], (M, N, K))))
    del row["shape"]
    return fitted(Config(**row), M, K, in_groups=scheme.endswith("g"))


def step_of(columns: int, groups: int) -> int:
    """Return the columns of a dot product in floating point by weights in so many groups.

    Below `SMALLEST_STEP` there is no kernel, because a matrix instruction takes at least as many.
    """
    size = columns // groups if groups > 1 else LARGEST_STEP
    return min(LARGEST_STEP, size & -size)


def shape_distance(a: tuple[int, int, int], b: tuple[int, int, int]) -> float:
    """Return how far two shapes are apart, in factors; a product of no tokens counts as one of a single token."""
    return sum(abs(log(max(x, 1) / max(y, 1))) for x, y in zip(a, b, strict=True))


def nearest_architecture(arch: str) -> str:
    """Return the architecture in the table that stands in for `arch`."""
    tabled = read_table()
    if arch in tabled or not arch.startswith("sm_"):
        return arch if arch in tabled else ON_AMD
    older = [name for name in tabled if name.startswith("sm_") and generation(name) <= generation(arch)]
    return max(older, key=generation, default="sm_80")


def generation(arch: str) -> int:
    """Return the number in an architecture's name, such as 90 of `sm_90`."""
    return int(arch.removeprefix("sm_"))


def fitted(config: Config, M: int, K: int, in_groups: bool) -> Config:
    """Make steps divide K and parts no more than steps; only a product of few tokens is split.

    Over very long rows `shift` could overflow, if not in groups; `mask` sums without the factor 16.
    """
    block_k = gcd(config.block_k, K) if K else config.block_k
    parts = min(config.split_k, max(K // block_k, 1)) if TOKEN_TILES * config.block_m >= M else 1
    overflows = config.variant == "shift" and K > LARGEST_K and not in_groups
    return replace(config, block_k=block_k, split_k=parts, variant="mask" if overflows else config.variant)
