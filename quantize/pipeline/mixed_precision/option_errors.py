"""The options of a unit are compared by the errors of its linears' outputs, as the recipe's quantizer makes them."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from quantize.calibration.runner import SequentialRunner
from quantize.calibration.statistics import Gram
from quantize.pipeline.bit_options import Unit
from quantize.pipeline.block import Block
from quantize.pipeline.rotation_choice import relative_errors
from quantize.quantizers.base import Quantizer
from quantize.quantizers.rtn import RoundToNearest
from quantize.scheme.scheme import Scheme
from quantize.transforms.online import InputTransform

OUTPUTS = 256  # of a linear that stand for all of them, as each is rounded by itself


def error_ratios(
    block: Block,
    units: Mapping[int, Unit],
    quantizer: Quantizer,
    floats: SequentialRunner,
    seen: SequentialRunner,
    finish: bool,
) -> dict[int, list[float]]:
    """Return the error of each option of a block's units, by a quantizer that has seen some inputs.

    It is over that of plain rounding with the first option.

    Args:
        block: the float block.
        units: its units, by number.
        quantizer: the recipe's.
        floats: the inputs on which errors are measured; they stay in front of the block.
        seen: the inputs that the quantizer sees; they advance through the block.
        finish: whether they advance beyond the last unit.
    """
    numbers = {unit.linears[0]: number for number, unit in units.items()}
    state, found = block.overrides(), dict[int, list[float]]()
    ahead = SequentialRunner.of(floats.program, floats.values)
    for sharing, _ in zip(
        ahead.advance_to_linears(block.segment, state, numbers, finish=False),
        seen.advance_to_linears(block.segment, state, numbers, finish),
        strict=True,
    ):
        for first in sharing:
            inputs, gram = list(ahead.inputs(block.segment, first, state)), Gram()
            for x in seen.inputs(block.segment, first, state) if quantizer.needs_gram else ():
                gram.update(block.input_transforms[first].rotate(x), dtype=block.product_dtype)
            found[numbers[first]] = unit_ratios(block, units[numbers[first]], quantizer, gram, inputs)
    return found


def unit_ratios(block: Block, unit: Unit, quantizer: Quantizer, gram: Gram, inputs: Sequence[Tensor]) -> list[float]:
    """Return the error of each option of a unit over that of plain rounding with the first.

    Errors are sums over the unit's linears of the mean over tokens of ‖Ŵ x̂ - W x‖² / ‖W x‖². The experts of a stack
    are taken to see the inputs of all of them, and inputs that no token reached leave plain rounding.
    """
    first = unit.linears[0]
    transform, dtype = block.input_transforms[first], block.dtypes[first.weight]
    weights = [(W := block.weight(linear))[:: -(-len(W) // OUTPUTS)] for linear in unit.linears]

    def error(how: Quantizer, scheme: Scheme) -> float:
        own = copy.deepcopy(gram) if how.needs_gram else None  # which is overwritten
        rounded = how.quantize_weights(weights, scheme.weights, own, dtype, block.product_dtype)
        behind = replace(transform, activations=scheme.activations)
        return sum(output_error(W, Q.dequantize(), behind, inputs) for W, Q in zip(weights, rounded, strict=True))

    plain, how = error(RoundToNearest(), unit.options[0].scheme), quantizer
    if quantizer.needs_gram and not gram.rows:
        how = RoundToNearest()
    return [error(how, option.scheme) / plain if plain else 0.0 for option in unit.options]


def output_error(W: Tensor, W_hat: Tensor, transform: InputTransform, inputs: Sequence[Tensor]) -> float:
    """Return the mean over tokens of ‖Ŵ x̂ - W x‖² / ‖W x‖², or ‖Ŵ - W‖² / ‖W‖² if no token came."""
    pairs = [(transform.quantized(x) @ W_hat.T, transform.rotate(x) @ W.T) for x in inputs if x.numel()]
    if not pairs:
        return float((W_hat - W).square().sum() / W.square().sum().clamp(min=1e-30))
    return float(torch.cat([relative_errors(*pair) for pair in pairs]).mean())
