"""The options of a unit are compared by the errors of its linears' outputs, as the recipe's quantizer makes them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from quantize.calibration.statistics import Gram
from quantize.graph.linears import Linear
from quantize.pipeline.block import Block
from quantize.pipeline.rotation_choice import relative_errors
from quantize.quantizers.base import Quantizer
from quantize.quantizers.rtn import RoundToNearest
from quantize.scheme.scheme import Scheme
from quantize.transforms.online import InputTransform

OUTPUTS = 256  # of a linear that stand for all of them, as each is rounded by itself


def alike(linears: Sequence[Linear], block: Block) -> list[list[Linear]]:
    """Split linears that share an input into those before which the same is done with it."""
    parts = dict[object, list[Linear]]()
    for linear in linears:
        parts.setdefault((block.input_transforms[linear], block.dtypes[linear.weight]), []).append(linear)
    return list(parts.values())


def able(quantizer: Quantizer, gram: Gram) -> Quantizer:
    """Return the quantizer, or plain rounding if it asks for inputs and no token came."""
    return quantizer if gram.rows or not quantizer.needs_gram else RoundToNearest()


def part_errors(
    block: Block,
    part: Sequence[Linear],
    schemes: Sequence[Scheme],
    quantizer: Quantizer,
    gram: Gram,
    inputs: Sequence[Tensor],
) -> list[float]:
    """Return the error of linears that see the same, with each scheme.

    Errors are sums over the linears of the mean over tokens of ‖Ŵ x̂ - W x‖² / ‖W x‖². The experts of a stack are
    taken to see the inputs of all of them, and inputs that no token reached leave plain rounding.
    """
    transform, dtype = block.input_transforms[part[0]], block.dtypes[part[0].weight]
    how = able(quantizer, gram)
    weights = [(W := block.weight(linear))[:: -(-len(W) // OUTPUTS)] for linear in part]

    def error(scheme: Scheme) -> float:
        own = copy.deepcopy(gram) if how.needs_gram else None  # which is overwritten
        rounded = how.quantize_weights(weights, scheme.weights, own, dtype, block.product_dtype)
        behind = replace(transform, activations=scheme.activations)
        return sum(output_error(W, Q.dequantize(), behind, inputs) for W, Q in zip(weights, rounded, strict=True))

    return [error(scheme) for scheme in schemes]


def output_error(W: Tensor, W_hat: Tensor, transform: InputTransform, inputs: Sequence[Tensor]) -> float:
    """Return the mean over tokens of ‖Ŵ x̂ - W x‖² / ‖W x‖², or ‖Ŵ - W‖² / ‖W‖² if no token came."""
    pairs = [(transform.quantized(x) @ W_hat.T, transform.rotate(x) @ W.T) for x in inputs if x.numel()]
    if not pairs:
        return float((W_hat - W).square().sum() / W.square().sum().clamp(min=1e-30))
    return float(torch.cat([relative_errors(*pair) for pair in pairs]).mean())
