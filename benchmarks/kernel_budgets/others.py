"""Entries of `kernels/budgets.json` other than single integer products: experts, quantizers, runtime smooth and FP4."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.kernel_budgets.compile_ahead import ARCHITECTURES
from benchmarks.kernel_budgets.entries import INT8, LAYOUTS, LOGIC, Entry, K, M, N, configurations
from benchmarks.kernel_budgets.meta_operands import meta, meta_activations, meta_weight
from quantize.kernels import (
    column_rounding,
    experts,
    fp4_gemm,
    fp4_linear,
    fp4_quantizer,
    smooth_gemm,
    smooth_maxima,
    token_quantizer,
    weight_only_gemm,
)
from quantize.kernels.config import Config, choose_config
from quantize.kernels.fp4_quantizer import Fp4Activations
from quantize.kernels.prologue import Prologue

EXPERTS = 8
NO_MMA = r""
HALF_MMA = r"HMMA\.16816\.F32\.BF16|v_mfma_f32_\w+_bf16(_1k)?"  # of a Hadamard matrix with bf16
FLOAT_MMA = rf"{HALF_MMA}|HGMMA\.64x\d+x16\.F32\.BF16|UTCHMMA\S*"
FLOAT_LOGIC = 16.0  # a nibble is shifted into the mantissa of a float, and its neighbours are put beside it
FP4_MMA = {"sm_100": r"UTCOMMA\S*", "sm_120": r"OMMA\.SF\.16864\.F32\.E2M1\.E2M1\.\S+"}
SMOOTH_LOGIC = 3.2  # weights become 16 · w


def others() -> Iterator[Entry]:
    """Yield all of them."""
    for arch in ARCHITECTURES:
        yield from quantizers(arch)
        yield from smooth(arch)
        yield from (weight_only(tokens, arch) for tokens in (16, M))
        yield weight_only(16, arch, levels=True)
        yield from (expert_product(scheme, arch) for scheme in ("w8a8", "w4a8", "w4a4", "w4a8g"))
    for arch in FP4_MMA:
        yield from fp4(arch)


def entry(kernel: str, arch: str, launch: Callable[[], object], mma: str = NO_MMA) -> Entry:
    """Return the entry of a kernel that has no weights to unpack; what it loads besides operands are scales."""
    return Entry(kernel, arch, launch, 0, re.compile(mma), 0.0, scales=True)


def quantizers(arch: str) -> Iterator[Entry]:
    """Yield the quantizers of tokens, alone and after a norm and a Hadamard matrix, and those of FP4."""
    x = meta(M, K, dtype=torch.bfloat16)
    norm = Prologue(gain=meta(K, dtype=torch.bfloat16), epsilon=1e-5, hadamard=128)
    yield entry("quantizer 8 bits", arch, lambda: token_quantizer.launch(x, 8, False, 1.0))
    yield entry("quantizer 4 bits", arch, lambda: token_quantizer.launch(x, 4, False, 1.0, "pair"))
    rotated = ("quantizer 4 bits, norm, Hadamard", arch)
    yield entry(*rotated, lambda: token_quantizer.launch(x, 4, False, 1.0, "pair", prologue=norm), HALF_MMA)
    panel, zero_point = meta(128, N, dtype=torch.float32), meta(128, N, dtype=torch.float32)
    square = meta(128, 128, dtype=torch.float32)
    rounding = (panel, panel, square, panel, zero_point, 4)
    yield entry("column rounding", arch, lambda: column_rounding.launch(*rounding))
    yield entry("quantizer MXFP4", arch, lambda: fp4_quantizer.launch(x, "mxfp4", 32))


def smooth(arch: str) -> Iterator[Entry]:
    """Yield the maxima of channels, and the product with one scale for each tile of K."""
    x = meta(M, K, dtype=torch.bfloat16)
    yield entry("smooth maxima", arch, lambda: smooth_maxima.launch(x, True))
    qx, order = meta_activations(M, K, "int8", in_groups=True), meta(K, dtype=torch.int64)
    data, scale = meta(K, N // 2, dtype=torch.int8), meta(N, dtype=torch.float32)
    config = Config(32, 128, num_warps=4, num_stages=3)
    yield Entry(
        "smooth w4a4 32x128", arch,
        lambda: smooth_gemm.launch(
            qx, data, scale, None, True, order, meta(K, dtype=torch.float32), 128, False, None, torch.bfloat16, config
        ),
        config.block_n * 128, re.compile(INT8[arch]), SMOOTH_LOGIC, scales=True,
    )  # fmt: skip


def weight_only(tokens: int, arch: str, levels: bool = False) -> Entry:
    """Return the product of activations in bfloat16 and 4-bit weights in groups of 128: zero points, or a code book."""
    config = choose_config(tokens, N, K, "w4a16", arch)
    x, data = meta(tokens, K, dtype=torch.bfloat16), meta(N, K // 2, dtype=torch.uint8)
    scale, zero_point = meta(K // 128, N, dtype=torch.float32), meta(K // 128, N, dtype=torch.int8)
    zeros, table = (None if levels else zero_point), (meta(16, dtype=torch.float32) if levels else None)
    return Entry(
        f"w4a16 {'levels ' if levels else ''}{config.block_m}x{config.block_n}", arch,
        lambda: weight_only_gemm.launch(x, data, scale, zeros, table, None, 4, config),
        config.block_n * config.block_k, re.compile(FLOAT_MMA), FLOAT_LOGIC, scales=True,
    )  # fmt: skip


def expert_product(scheme: str, arch: str) -> Entry:
    """Return the product of eight experts in the smallest tile of the table, as when a few tokens are generated."""
    in_groups, (weights, activations) = scheme.endswith("g"), LAYOUTS[scheme.removesuffix("g")]
    config = min(configurations(arch, scheme), key=lambda config: (config.block_m, config.block_n))
    qa, pw = meta_activations(M, K, activations, in_groups), meta_weight(N, K, weights, in_groups)
    pw = replace(pw, zero_point=None) if in_groups else pw
    return Entry(
        f"experts {scheme} {config.block_m}x{config.block_n}", arch,
        lambda: experts.launch(qa, pw, meta(EXPERTS), None, torch.bfloat16, replace(config, split_k=1)),
        config.block_n * (128 if in_groups else config.block_k), re.compile(INT8[arch]), LOGIC[config.variant],
        scales=in_groups,
    )  # fmt: skip


def fp4(arch: str) -> Iterator[Entry]:
    """Yield products of FP4 on GPUs that have such instructions."""
    for tokens in (16, M):
        yield fp4_product("mxfp4", 32, None, arch, tokens)
        yield fp4_product("nvfp4", 16, meta(dtype=torch.float32), arch, tokens)


def fp4_product(name: str, group: int, global_scale: Tensor | None, arch: str, tokens: int) -> Entry:
    """Return a product in the tile that is chosen for so many tokens."""
    config, pure = fp4_linear.choose_fp4_config(tokens, arch)
    of_tokens = None if global_scale is None else meta(tokens, dtype=torch.float32)
    qx = Fp4Activations(fp4_bytes(tokens, K // 2), fp4_bytes(tokens, K // group), of_tokens)
    data, scale = fp4_bytes(N, K // 2), fp4_bytes(N, K // group)
    return entry(
        f"{name} {config.block_m}x{config.block_n}", arch,
        lambda: fp4_gemm.launch(qx, data, scale, global_scale, None, torch.bfloat16, config, pure), FP4_MMA[arch],
    )  # fmt: skip


def fp4_bytes(*shape: int) -> Tensor:
    """Return codes, two in a byte, or bytes of scales."""
    return meta(*shape, dtype=torch.uint8)
