"""A quantized linear on a GPU multiplies with kernels: which of them exist, and the weight laid out for them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from quantize.formats import get_format
from quantize.formats.qtensor import QTensor
from quantize.kernels.ops import (
    PackedWeight,
    expert_linear,
    fp4_linear,
    fuses,
    has_kernel,
    has_smooth_kernel,
    has_weight_only_kernel,
    on_kernels,
    pack_int4,
    packed_linear,
    prepack,
    smooth_linear,
    smooth_prepack,
    weight_only_linear,
)
from quantize.scheme.scheme import ActivationArgs, WeightArgs
from quantize.transforms.online import Hadamard, Online

SMALLEST_BITS, LEVEL_BITS = 4, 8  # that kernels read, and of levels that are integers
Operands = PackedWeight | list[Tensor | None]


def kernel_bits(args: WeightArgs, activations: ActivationArgs | None) -> int:
    """Return the bits at which kernels read weights.

    Integers of fewer than 4 bits are laid out as 4-bit ones. Codes of a code book are multiplied as they are by floats,
    and as the integers in 8 bits that they stand for by integers.
    """
    in_levels = get_format(args.format).element == "level" and activations is not None
    return LEVEL_BITS if in_levels else max(SMALLEST_BITS, args.num_bits)


def has_gpu_kernel(x: Tensor, weight: QTensor, args: ActivationArgs | None) -> bool:
    """Return whether a kernel multiplies activations x [..., K], quantized as `args` says, by this weight."""
    element = get_format(weight.args.format).element
    groups, bits = weight.scale.shape[1], kernel_bits(weight.args, args)
    if args is None:
        return element != "e2m1" and has_weight_only_kernel(x, groups, bits)
    if element == "e2m1":
        return on_kernels(x)
    if args.runtime_smooth:
        return has_smooth_kernel(x, args.runtime_smooth.group_size)
    return has_kernel(x, groups, bits)


def has_expert_kernel(x: Tensor, weight: QTensor, args: ActivationArgs | None) -> bool:
    """Return whether one kernel multiplies rows x [..., K] of several experts by the weights of all of them."""
    in_integers = get_format(weight.args.format).element == "int"
    return in_integers and args is not None and args.runtime_smooth is None and has_gpu_kernel(x, weight, args)


def prepack_weight(weight: QTensor, args: ActivationArgs | None) -> Operands:
    """Lay out the weight as the kernel for `args` reads it; where activations stay as they are, as it is stored."""
    number_format = get_format(weight.args.format)
    if args is None:
        by_group = (None if x is None else x.T.contiguous() for x in (weight.unpack_scale().float(), weight.zero_point))
        data = weight.data if weight.args.num_bits >= SMALLEST_BITS else pack_int4(weight.unpack())
        table = number_format.table
        return [data, *by_group, None if table is None else table.float().to(data.device)]
    if number_format.element == "e2m1":  # a model of another dtype may have cast the scales, which leaves their values
        (stored,) = number_format.scale_dtypes
        global_scale = None if weight.global_scale is None else weight.global_scale.float()
        return [weight.data, weight.scale.to(stored).view(torch.uint8), global_scale]
    layout = smooth_prepack if args.runtime_smooth else prepack
    return layout(weight.unpack(), weight.scale, weight.zero_point, kernel_bits(weight.args, args))


def split_fused_hadamard(online: Sequence[Online]) -> tuple[Sequence[Online], int]:
    """Return the transforms in front of a kernel, and the order of the Hadamard transform inside it, 0 for none."""
    last = online[-1] if online else None
    if isinstance(last, Hadamard) and last.stride == 1 and fuses(last.size):
        return online[:-1], last.size
    return online, 0


def gpu_linear(
    x: Tensor, operands: Operands, bias: Tensor | None, weight_bits: int, args: ActivationArgs | None, hadamard: int
) -> Tensor:
    """Compute what `quantized_linear` computes, [..., K] → [..., N] in the dtype of x.

    Args:
        x: float16, bfloat16 or float32.
        operands: the weight as `prepack_weight` returns it.
        bias: [N] or None.
        weight_bits: the bits at which the kernel reads the weight (`kernel_bits`).
        args: how x is quantized; None leaves it in floating point.
        hadamard: the order that `split_fused_hadamard` returns.
    """
    rows = x.reshape(-1, x.shape[-1])
    if args is None:
        assert isinstance(operands, list)
        y: Tensor = weight_only_linear(rows, *operands, bias, weight_bits)
        return y.reshape(*x.shape[:-1], y.shape[1])
    grid, smooth = (args.num_bits, args.symmetric, args.clip_ratio), args.runtime_smooth
    if isinstance(operands, PackedWeight):
        y = packed_linear(rows, operands, bias, *grid, hadamard)
    elif smooth:
        rule = (smooth.group_size, smooth.normalize_tokens)
        y = smooth_linear(rows, *operands, bias, weight_bits, *grid, *rule, hadamard)
    else:
        y = fp4_linear(rows, *operands, bias, args.clip_ratio, hadamard)
    return y.reshape(*x.shape[:-1], y.shape[1])


def gpu_expert_linear(
    x: Tensor, operands: Operands, ends: Tensor, bias: Tensor | None, args: ActivationArgs, hadamard: int
) -> Tensor:
    """Compute `gpu_linear` with the weight of each row's expert, [M, K] → [M, N]; rows of no expert become zeros.

    Args:
        ends: integers [E], the row behind each expert's last one; rows are sorted by expert.
        x, operands, bias, args, hadamard: as there, with weights [E · N, K] that have an expert kernel.
    """
    assert isinstance(operands, PackedWeight)
    y = expert_linear(x, operands, ends.int(), bias, args.num_bits, args.symmetric, args.clip_ratio, hadamard)
    return y.masked_fill_((torch.arange(len(x), device=x.device) >= ends[-1])[:, None], 0)
