"""The options of a unit are compared by the errors of its linears' outputs, as the recipe's quantizer makes them."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from quantize.calibration.runner import SequentialRunner
from quantize.calibration.statistics import Gram
from quantize.graph.linears import Linear
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
        for number in (numbers[first] for first in sharing):
            unit, errors = units[number], list[list[float]]()
            for part in alike(unit.linears, block):
                transform, gram = block.input_transforms[part[0]], Gram()
                for x in seen.inputs(block.segment, part[0], state) if quantizer.needs_gram else ():
                    gram.update(transform.rotate(x), dtype=block.product_dtype)
                inputs = list(ahead.inputs(block.segment, part[0], state))
                errors.append(part_errors(block, part, [o.scheme for o in unit.options], quantizer, gram, inputs))
            plain, *others = map(sum, zip(*errors, strict=True))
            found[number] = [error / plain if plain else 0.0 for error in others]
    return found


def alike(linears: Sequence[Linear], block: Block) -> list[list[Linear]]:
    """Split linears that share an input into those before which the same is done with it."""
    parts = dict[object, list[Linear]]()
    for linear in linears:
        parts.setdefault((block.input_transforms[linear], block.dtypes[linear.weight]), []).append(linear)
    return list(parts.values())


def part_errors(
    block: Block,
    part: Sequence[Linear],
    schemes: Sequence[Scheme],
    quantizer: Quantizer,
    gram: Gram,
    inputs: Sequence[Tensor],
) -> list[float]:
    """Return the error of linears that see the same, by plain rounding with the first scheme and then with each.

    Errors are sums over the linears of the mean over tokens of ‖Ŵ x̂ - W x‖² / ‖W x‖². The experts of a stack are
    taken to see the inputs of all of them, and inputs that no token reached leave plain rounding.
    """
    transform, dtype = block.input_transforms[part[0]], block.dtypes[part[0].weight]
    weights = [(W := block.weight(linear))[:: -(-len(W) // OUTPUTS)] for linear in part]

    def error(how: Quantizer, scheme: Scheme) -> float:
        own = copy.deepcopy(gram) if how.needs_gram else None  # which is overwritten
        rounded = how.quantize_weights(weights, scheme.weights, own, dtype, block.product_dtype)
        behind = replace(transform, activations=scheme.activations)
        return sum(output_error(W, Q.dequantize(), behind, inputs) for W, Q in zip(weights, rounded, strict=True))

    how = quantizer if gram.rows or not quantizer.needs_gram else RoundToNearest()
    return [error(RoundToNearest(), schemes[0]), *(error(how, scheme) for scheme in schemes)]


def output_error(W: Tensor, W_hat: Tensor, transform: InputTransform, inputs: Sequence[Tensor]) -> float:
    """Return the mean over tokens of ‖Ŵ x̂ - W x‖² / ‖W x‖², or ‖Ŵ - W‖² / ‖W‖² if no token came."""
    pairs = [(transform.quantized(x) @ W_hat.T, transform.rotate(x) @ W.T) for x in inputs if x.numel()]
    if not pairs:
        return float((W_hat - W).square().sum() / W.square().sum().clamp(min=1e-30))
    return float(torch.cat([relative_errors(*pair) for pair in pairs]).mean())
