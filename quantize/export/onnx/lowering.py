"""Quantized linears are lowered to operators for which ONNX Runtime has fast CPU kernels.

Each module is both sides of an export: when `torch.onnx.export` traces it, it emits ONNX operators; when torch calls
it, it computes from the same buffers what ONNX Runtime computes, rounding included.
"""

from __future__ import annotations

from collections.abc import Iterator

from quantize.errors import UsageError
from quantize.export.base import Obstacle
from quantize.export.onnx.matmul_cast import CastLinear
from quantize.export.onnx.matmul_integer import IntegerLinear
from quantize.export.onnx.matmul_nbits import BlockLinear, odd_groups
from quantize.export.outline import Outline
from quantize.formats import get_format
from quantize.nn.quantized_linear import QuantizedLinear
from quantize.scheme.scheme import Scheme

Lowered = BlockLinear | IntegerLinear | CastLinear
RUNNABLE = "W8A8, W6A6, W4A8, W4A4, W8A16, W4A16 and W3A16"
QUANTIZED_CACHE = Obstacle(
    "the model's keys and values are quantized, for which ONNX Runtime's Attention has no input",
    "quantize without the table kv_cache, or run the artifact with quantize.load",
)
SMOOTH = Obstacle(
    "runtime smooth sorts channels anew for each batch, which no kernel of ONNX Runtime does",
    "quantize without the pass `runtime_smooth`",
)


def obstacles(outline: Outline) -> Iterator[Obstacle]:
    """Yield what ONNX Runtime cannot run of an artifact, each reason once."""
    if outline.settings.get("kv_cache"):
        yield QUANTIZED_CACHE
    modules = outline.settings["modules"]
    found = (unrunnable(scheme, modules[path]["columns"]) for path, scheme in outline.schemes().items())
    yield from sorted({obstacle for obstacle in found if obstacle})


def unrunnable(scheme: Scheme, columns: int) -> Obstacle | None:
    """Return why ONNX Runtime has no kernel for a linear, or None if it has one."""
    weights, activations = scheme.weights, scheme.activations
    instead = f"quantize with one of {RUNNABLE}"
    has_zero_points_of_floats = get_format(weights.format).zero_point_dtype.is_floating_point
    if get_format(weights.format).element != "int" and not has_zero_points_of_floats:
        return Obstacle(f"ONNX Runtime's CPU kernels multiply no {weights.format} values", f"{instead} in integers")
    if activations is not None and activations.runtime_smooth is not None:
        return SMOOTH
    if is_block(scheme):
        return odd_groups(columns, weights.group_size)
    if activations is None and (weights.group_size, weights.symmetric) != (0, True):
        what = f"{weights.num_bits}-bit weights in groups or with zero points, and floating-point activations,"
        return Obstacle(f"{what} have no fast kernel in ONNX Runtime", instead)
    return None


def is_block(scheme: Scheme) -> bool:
    """Return whether a linear becomes a `BlockLinear`: 3-bit or 4-bit weights with float or 8-bit activations."""
    return scheme.weights.num_bits <= 4 and (scheme.activations is None or scheme.activations.num_bits == 8)


def lower(layer: QuantizedLinear) -> Lowered:
    """Lower a linear, float32 [..., K] → [..., N], to the ONNX operators that are fast on few tokens.

    3-bit and 4-bit weights with float or 8-bit activations become `BlockLinear`, all other pairs of integers
    `IntegerLinear`, and other weights with float activations `CastLinear`.

    Raises:
        UsageError: ONNX Runtime has no kernel for the layer's scheme.
    """
    if obstacle := unrunnable(layer.scheme, layer.in_features):
        raise UsageError(str(obstacle))
    activations = layer.scheme.activations
    if is_block(layer.scheme):
        return BlockLinear(layer)
    return CastLinear(layer) if activations is None else IntegerLinear(layer, activations)


def lower_for_prefill(layer: QuantizedLinear) -> Lowered:
    """Lower as `lower`, but make W4A8 with one group an `IntegerLinear`, which is exact.

    From 16 tokens on it is up to twice as fast. Its weights take 8 bits in memory.
    """
    lowered, activations = lower(layer), layer.scheme.activations
    if activations is not None and layer.scale.shape[1] == 1:
        return IntegerLinear(layer, activations)
    return lowered
