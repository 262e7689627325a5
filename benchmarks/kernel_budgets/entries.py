"""An entry of `kernels/budgets.json` is a kernel in a configuration on a GPU, with the demands on it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

from benchmarks.kernel_budgets.compile_ahead import ARCHITECTURES
from benchmarks.kernel_budgets.meta_operands import meta_activations, meta_weight
from quantize.kernels.config import Config, read_table
from quantize.kernels.custom_ops import launch_gemm
from quantize.kernels.packed import BLOCK

M, N, K = 4096, 14336, 4096
INT8 = {
    "sm_80": r"IMMA\.16832\.S8\.S8", "sm_89": r"IMMA\.16832\.S8\.S8", "sm_120": r"IMMA\.16832\.S8\.S8",
    "sm_90": r"IGMMA\.64x\d+x32\.S8\.S8", "sm_100": r"UTCIMMA", "gfx942": r"v_mfma_i32_\d+x\d+x\d+_i8",
}  # fmt: skip
INT4 = r"IMMA\.16864\.S4\.S4"
LOGIC = {
    "shift": 3.2,
    "mask": 2.2,
    "pair": 1.0,
    "bytes": 0.5,
    "native": 0.0,
}  # for 8 weights; scales of groups take some
LAYOUTS = {"w4a8": ("w4", "int8"), "w4a4": ("w4", "pair"), "w8a8": ("w8", "int8"), "s4a4": ("s4", "s4")}


@dataclass(frozen=True)
class Entry:
    """One kernel in one configuration for one GPU.

    Attributes:
        kernel: the name under which a regression is reported.
        arch: a key of `ARCHITECTURES`.
        launch: launches the kernel on tensors of the meta device.
        weights: the weights that a CTA unpacks in an iteration.
        mma: the instruction by which it must multiply.
        logic: the most operations for 8 weights.
        scales: whether its loop loads scales.
    """

    kernel: str
    arch: str
    launch: Callable[[], object]
    weights: int
    mma: re.Pattern[str]
    logic: float
    scales: bool = False


def products() -> Iterator[Entry]:
    """Yield integer products in the configurations of the table, and native int4 products."""
    for arch in ARCHITECTURES:
        for scheme in read_table()[arch]:
            for config in configurations(arch, scheme) if scheme != "w4a16" else ():
                yield product(scheme, arch, config)
        yield product("w4a8g", arch, configurations(arch, "w4a8g")[-1], zero_points=True)
    for arch in ("sm_80", "sm_89"):
        native = Config(128, 128, 2 * BLOCK, num_warps=8, num_stages=3, variant="native", asm=True)
        yield product("s4a4", arch, native)


def configurations(arch: str, scheme: str) -> list[Config]:
    """Return the different tiles of the shipped table, each with the most parts of K that any shape has."""
    found: dict[Config, int] = {}
    for row in read_table()[arch][scheme]:
        config = Config(**{name: value for name, value in row.items() if name != "shape"})
        tile = replace(config, split_k=1)
        found[tile] = max(found.get(tile, 1), config.split_k)
    return [replace(tile, split_k=parts) for tile, parts in found.items()]


def product(scheme: str, arch: str, config: Config, zero_points: bool = False) -> Entry:
    """Return a product by the kernel that serves this scheme and configuration.

    Weights have zero points where these cost next to nothing: with one scale for each channel.
    """
    in_groups = scheme.endswith("g")
    weights, activations = LAYOUTS[scheme.removesuffix("g")]
    tokens = config.block_m if config.split_k > 1 else M
    qa, pw = meta_activations(tokens, K, activations, in_groups), meta_weight(N, K, weights, in_groups)
    pw = pw if zero_points or not in_groups else replace(pw, zero_point=None)
    return Entry(
        kernel=f"{scheme} {config.block_m}x{config.block_n}{' zero points' if zero_points else ''}",
        arch=arch,
        launch=lambda: launch_gemm(qa, pw, None, torch.bfloat16, config),
        weights=config.block_n * (BLOCK if in_groups else config.block_k),
        mma=re.compile(INT4 if config.variant == "native" else INT8[arch]),
        logic=LOGIC[config.variant],
        scales=in_groups,
    )
