"""The quantizer and the product are operators of torch, which compilers and exporters keep whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from quantize.kernels import engine
from quantize.kernels.config import Config, architecture, choose_config
from quantize.kernels.packed import BLOCK, PackedWeight, QuantizedActivations, pack_activations
from quantize.kernels.prepack import exact_expert_gemm, exact_gemm
from quantize.kernels.prologue import Prologue
from quantize.kernels.reference import quantize_per_token


@torch.library.custom_op("quantize_model::quantize_tokens", mutates_args=())
def quantize_tokens(
    x: Tensor, num_bits: int, symmetric: bool, clip_ratio: float, layout: str, group_size: int,
    gain: Tensor | None = None, epsilon: float = 0.0, hadamard: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Quantize [M, K] to the tensors of `QuantizedActivations`, with the steps in front that `Prologue` describes."""
    prologue, grid = Prologue(gain, epsilon, hadamard), (num_bits, symmetric, clip_ratio)
    if engine.runs_on_triton(x):
        from quantize.kernels import token_quantizer

        qa = token_quantizer.launch(x, *grid, layout, group_size, prologue)
    else:
        q, scale, zero_point = quantize_per_token(prologue.applied(x), *grid)
        qa = pack_activations(q, scale[:, 0], zero_point[:, 0], layout, group_size)
    return qa.q, qa.scale, qa.zero_point, qa.sum, qa.low_sum


@quantize_tokens.register_fake
def _(x: Tensor, *settings: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    (M, K), group_size = x.shape, settings[4]
    q = x.new_empty((M, -(-K // BLOCK) * BLOCK), dtype=torch.int8)
    scale = x.new_empty((M,), dtype=torch.float32)
    zero_point, low_sum = (x.new_empty((M,), dtype=torch.int32) for _ in range(2))
    return q, scale, zero_point, x.new_empty((M, K // (group_size or K)), dtype=torch.int32), low_sum


@torch.library.custom_op("quantize_model::gemm", mutates_args=())
def gemm(
    activations: Sequence[Tensor], activation_layout: str,
    weight: Sequence[Tensor | None], columns: int, weight_layout: str,
    bias: Tensor | None, out_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Multiply the fields of `QuantizedActivations` and of `PackedWeight`: [M, N] = X Wᵀ + bias."""
    qa = QuantizedActivations.of(activations, activation_layout)
    pw = PackedWeight.of(weight, columns, weight_layout)
    multiply = triton_gemm if engine.runs_on_triton(qa.q) else exact_gemm
    return multiply(qa, pw, bias, out_dtype)


@gemm.register_fake
def _(activations: Sequence[Tensor], _: str, weight: Sequence[Tensor], *others: Any) -> Tensor:
    q, data = activations[0], weight[0]
    return q.new_empty((q.shape[0], data.shape[0]), dtype=others[-1])


def triton_gemm(qa: QuantizedActivations, pw: PackedWeight, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    """Compute the product in the configuration of the table."""
    scheme = f"{pw.layout}a{4 if qa.layout == 'pair' else 8}" + "g" * (pw.group_scale is not None)
    config = choose_config(qa.q.shape[0], pw.data.shape[0], qa.q.shape[1], scheme, architecture(qa.q.device))
    return launch_gemm(qa, pw, bias, out_dtype, config)


def launch_gemm(
    qa: QuantizedActivations, pw: PackedWeight, bias: Tensor | None, out_dtype: torch.dtype, config: Config
) -> Tensor:
    """Compute the product by a configuration's kernel; Triton is imported here, because not every machine has it."""
    from quantize.kernels import gemm, grouped, int4_mma, split_k

    if config.variant == "native":
        return int4_mma.launch(qa, pw, bias, out_dtype, config)
    in_groups = pw.group_scale is not None
    launch = grouped.launch if in_groups else split_k.launch if config.split_k > 1 else gemm.launch
    return launch(qa, pw, bias, out_dtype, config)


@torch.library.custom_op("quantize_model::expert_gemm", mutates_args=())
def expert_gemm(
    activations: Sequence[Tensor], activation_layout: str,
    weight: Sequence[Tensor | None], columns: int, weight_layout: str,
    ends: Tensor, bias: Tensor | None, out_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Multiply rows that are sorted by expert, each by its expert's weight: [M, N] = X Wₑᵀ + bₑ."""
    qa = QuantizedActivations.of(activations, activation_layout)
    pw = PackedWeight.of(weight, columns, weight_layout)
    multiply = triton_expert_gemm if engine.runs_on_triton(qa.q) else exact_expert_gemm
    return multiply(qa, pw, ends, bias, out_dtype)


@expert_gemm.register_fake
def _(
    activations: Sequence[Tensor], _: str, weight: Sequence[Tensor], columns: int, __: str, ends: Tensor, *others: Any
) -> Tensor:
    del columns
    q, data = activations[0], weight[0]
    return q.new_empty((q.shape[0], data.shape[0] // ends.shape[0]), dtype=others[-1])


def triton_expert_gemm(
    qa: QuantizedActivations, pw: PackedWeight, ends: Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    """Compute the product in the configuration that the table has for as many tokens as an expert gets in the mean."""
    from quantize.kernels import experts

    M, E = qa.q.shape[0], ends.shape[0]
    scheme = f"{pw.layout}a{4 if qa.layout == 'pair' else 8}" + "g" * (pw.group_scale is not None)
    shape = (-(-M // E), pw.data.shape[0] // E, qa.q.shape[1])
    config = replace(choose_config(*shape, scheme, architecture(qa.q.device)), split_k=1)
    return experts.launch(qa, pw, ends, bias, out_dtype, config)
