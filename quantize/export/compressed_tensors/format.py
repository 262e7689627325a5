"""The compressed-tensors format stores quantized linears as tensors and describes them in `config.json`.

Source: the package compressed-tensors 0.20, `compressors/` for the tensors, `quantization/` for the settings.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from quantize.export.outline import Outline
from quantize.formats import get_format
from quantize.formats.qtensor import QTensor
from quantize.kernels.ops import pack_bits
from quantize.scheme.scheme import TABLE_SCHEME, ActivationArgs, Scheme, WeightArgs

NAME = "compressed-tensors"
UNPACKED = "with CompressedTensorsConfig(dequantize=True) alone"  # how transformers loads some checkpoints
MIXED = "mixed-precision"  # the name for groups whose weights are stored in different ways
SIGN_BITS = 0x88  # the sign bits of a byte's two nibbles; flipping them turns two's complement q into unsigned q + 8
WORD_BITS = 32
WORD = 32  # integers that fill whole words, whatever their bits


def held_schemes(outline: Outline) -> dict[str, Scheme]:
    """Return the schemes of the linears that a checkpoint holds as integers, by path.

    The linear that scores the vocabulary is left out where it is in 8 bits: it becomes floating point again, as the
    format has no place for it beside weights with zero points, and engines differ on whether they read it.
    """
    return {path: scheme for path, scheme in outline.schemes().items() if scheme != TABLE_SCHEME}


def stored(weight: QTensor, packed: bool) -> dict[str, Tensor]:
    """Return the tensors of a weight [N, K] with G groups.

    Args:
        weight: a weight of any format.
        packed: whether integers are packed into words, as `is_packed` says; otherwise they are bytes.

    Returns:
        FP4: weight_packed uint8 [N, K/2], weight_scale [N, G]; for NVFP4 also weight_global_scale float32 [1], a
            divisor.
        Packed, integers of b bits: weight_packed int32 [N, ⌈K · b / 32⌉], weight_scale [N, G], weight_shape,
            weight_zero_point int32 [⌈N · b / 32⌉, G].
        Bytes: weight int8 [N, K], weight_scale [N, G], weight_zero_point int8 [N, G].
    """
    scale, zero_point = {"weight_scale": weight.scale}, weight.zero_point
    if get_format(weight.args.format).element == "e2m1":
        global_scale = (
            {} if weight.global_scale is None else {"weight_global_scale": weight.global_scale.reciprocal().reshape(1)}
        )
        return {"weight_packed": weight.data, **scale, **global_scale}
    if not packed:
        return {"weight": weight.unpack(), **scale, **({} if zero_point is None else {"weight_zero_point": zero_point})}
    bits = weight.args.num_bits
    zeros = {} if zero_point is None else {"weight_zero_point": words(zero_point.T, bits).T}
    whole = bits == 4 and weight.columns % (WORD_BITS // bits) == 0  # the bytes are in the order of words already
    packed_q = (weight.data ^ SIGN_BITS).view(torch.int32) if whole else words(weight.unpack(), bits)
    shape = torch.tensor([len(weight.data), weight.columns])
    return {"weight_packed": packed_q, **scale, "weight_shape": shape, **zeros}


def words(q: Tensor, bits: int) -> Tensor:
    """Pack integers of b = 3, 4 or 8 bits, int8 [R, C], into int32 [R, ⌈C · b / 32⌉].

    They are stored as unsigned q + 2^(b - 1), as one stream of bits a row, the first in the lowest bits, padded with 0.
    """
    sign = -(1 << (bits - 1))
    filled = nn.functional.pad(q, (0, -q.shape[1] % WORD), value=sign) ^ sign
    data = pack_bits(filled, bits) if bits <= 4 else filled.contiguous().view(torch.uint8)
    packed: Tensor = data.flatten().view(torch.int32)
    return packed.reshape(len(q), -1)[:, : -(-q.shape[1] * bits // WORD_BITS)]


def quantization_config(schemes: Mapping[str, Scheme], ignore: list[str]) -> dict[str, Any]:
    """Return the settings that the package writes into `config.json`.

    Args:
        schemes: the scheme of each quantized linear, by path. If all have one scheme, its target is the class `Linear`;
            otherwise each scheme has a group that names its linears.
        ignore: the modules that stay in floating point.
    """
    paths: dict[Scheme, list[str]] = {}
    for path, scheme in schemes.items():
        paths.setdefault(scheme, []).append(path)
    groups = [group(scheme, targets if len(paths) > 1 else ["Linear"]) for scheme, targets in paths.items()]
    formats = {storage(scheme) for scheme in paths}
    return {
        "quant_method": NAME,
        "format": formats.pop() if len(formats) == 1 else MIXED,
        "quantization_status": "compressed",
        "config_groups": {f"group_{number}": found for number, found in enumerate(groups)},
        "ignore": ignore,
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def group(scheme: Scheme, targets: list[str]) -> dict[str, Any]:
    """Return the entry of `config_groups` for some linears."""
    return {
        "targets": targets,
        "weights": arguments(scheme.weights, "channel", dynamic=False),
        "input_activations": scheme.activations and arguments(scheme.activations, "token", dynamic=True),
        "output_activations": None,
        "format": storage(scheme),
    }


def storage(scheme: Scheme) -> str:
    """Return the format's name for how weights are stored."""
    if get_format(scheme.weights.format).element == "e2m1":
        return f"{scheme.weights.format}-pack-quantized"
    return "pack-quantized" if is_packed(scheme) else "int-quantized"


def is_packed(scheme: Scheme) -> bool:
    """Return whether integers lie in words: behind float activations, or 4 bits if nothing has a zero point.

    vLLM multiplies packed weights by integer activations without zero points; bytes it multiplies on CPUs alone. The
    package 0.20 cannot read packed zero points beside integer activations.
    """
    args = scheme.activations
    return args is None or (scheme.weights.num_bits == 4 and scheme.weights.symmetric and args.symmetric)


def has_packed_zero_points(scheme: Scheme) -> bool:
    """Return whether zero points lie in words, which the package 0.20 reads only if it dequantizes all linears."""
    return storage(scheme) == "pack-quantized" and not scheme.weights.symmetric


def arguments(args: WeightArgs | ActivationArgs, whole: str, dynamic: bool) -> dict[str, Any]:
    """Return the `QuantizationArgs` of weights or inputs.

    Args:
        args: the weights or the inputs.
        whole: the format's name for one scale for each row.
        dynamic: whether scales are computed at run time; for NVFP4 this holds for groups, not for the tensor's scale.
    """
    number_format = get_format(args.format)
    group_size = args.group_size if isinstance(args, WeightArgs) else number_format.group_size
    strategy = "tensor_group" if number_format.has_global_scale else "group" if group_size else whole
    scale_dtype = {"scale_dtype": str(*number_format.scale_dtypes)} if number_format.element == "e2m1" else {}
    return {
        "num_bits": args.num_bits,
        "type": "float" if number_format.element == "e2m1" else "int",
        "symmetric": args.symmetric,
        "strategy": strategy,
        "group_size": group_size or None,
        "dynamic": "local" if dynamic and number_format.has_global_scale else dynamic,
        **scale_dtype,
    }
