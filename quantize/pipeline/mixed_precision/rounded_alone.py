"""Each unit of a block is rounded alone, and the linears that read its outputs make up for its error as in a run.

Without the second half queries, keys and values seem to cost several times what they do: if the quantizer is GPTAQ, the
linear behind attention takes most of their error back. What lies behind that linear finds little left.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import fx

from quantize.calibration.runner import SequentialRunner
from quantize.calibration.statistics import Gram
from quantize.graph.linears import Linear
from quantize.graph.program import Segment
from quantize.nn.prefix_tokens import PrefixTokens
from quantize.pipeline.bit_options import Unit
from quantize.pipeline.block import Block
from quantize.pipeline.mixed_precision.option_errors import able, alike, part_errors
from quantize.quantizers.base import Quantizer


@dataclass
class Alone:
    """A unit that is rounded by its first option.

    Attributes:
        block: the block, in which the linears that read the unit's outputs have made up for its error.
        rows: what the quantizer sees, on its way through this block.
        readers: the linears that have not made up for the error yet.
        ratios: the error of each of the unit's options over that of the first.
    """

    block: Block
    rows: SequentialRunner
    readers: set[Linear]
    ratios: list[float]


def rounded_alone(
    block: Block,
    units: Mapping[int, Unit],
    quantizer: Quantizer,
    judged: SequentialRunner,
    seen: SequentialRunner,
    prefix: PrefixTokens,
    finish: bool,
) -> dict[int, Alone]:
    """Return each of a block's units rounded alone, by a quantizer that has seen some inputs.

    Args:
        block: the float block.
        units: its units, by number.
        quantizer: the recipe's.
        judged: the inputs on which options are compared; they stay in front of the block.
        seen: the inputs that the quantizer sees; they advance through the block.
        prefix: the tokens in front of each row.
        finish: whether they advance beyond the last unit.
    """
    numbers = {unit.linears[0]: number for number, unit in units.items()}
    state, found, at = block.overrides(), dict[int, Alone](), 0
    ahead, makes_up = SequentialRunner.of(judged.program, judged.values), quantizer.needs_float_reference
    for sharing, _ in zip(
        ahead.advance_to_linears(block.segment, state, numbers, finish=False),
        seen.advance_to_linears(block.segment, state, numbers, finish),
        strict=True,
    ):
        before = [each for each in found.values() if each.readers]
        for each in before:
            each.rows.run(block.segment.nodes[at : seen.position], each.block.overrides())
            each.rows.position = seen.position
        at = seen.position
        for number in (numbers[first] for first in sharing):
            unit, rounded, errors = units[number], block, list[list[float]]()
            for part in alike(unit.linears, block):
                for each in (x for x in before if x.readers.intersection(part)):
                    each.block = made_up(each, block, part, quantizer, seen)
                    each.readers.difference_update(part)
                gram = Gram()
                for x in seen.inputs(block.segment, part[0], state) if quantizer.needs_gram else ():
                    gram.update(block.input_transforms[part[0]].rotate(x), dtype=block.product_dtype)
                inputs = list(ahead.inputs(block.segment, part[0], state))
                errors.append(part_errors(block, part, [o.scheme for o in unit.options], quantizer, gram, inputs))
                rounded = with_rounded(rounded, part, unit, able(quantizer, gram), gram, prefix)
            first, *others = map(sum, zip(*errors, strict=True))
            ratios = [1.0, *(error / first if first else 0.0 for error in others)]
            readers = readers_of(unit, units.values(), block.segment) if makes_up else set[Linear]()
            rows = SequentialRunner.of(seen.program, map(dict, seen.values) if readers else [])
            found[number] = Alone(rounded, rows, readers, ratios)
    return found


def readers_of(unit: Unit, units: Iterable[Unit], segment: Segment) -> set[Linear]:
    """Return the linears, but experts, that read what a unit of a block computes, with no other linear between."""
    linears = {node: linear for other in units for linear in other.linears for node in linear.calls}
    found, passed, inside = set[Linear](), set[fx.Node](), set(segment.nodes)
    waiting = [node for linear in unit.linears for node in linear.calls]
    while waiting:
        for user in waiting.pop().users.keys() - passed:
            passed.add(user)
            if user not in linears and user in inside:
                waiting.append(user)
            elif user in linears and linears[user] not in unit.linears:
                found.add(linears[user])
    return {linear for linear in found if linear.experts is None}


def with_rounded(
    block: Block, part: Sequence[Linear], unit: Unit, quantizer: Quantizer, gram: Gram, prefix: PrefixTokens
) -> Block:
    """Return a block with linears that see the same rounded as their unit's first option says."""
    weights, args = [block.weight(linear) for linear in part], unit.options[0].scheme.weights
    own = copy.deepcopy(gram) if quantizer.needs_gram else None
    rounded = quantizer.quantize_weights(weights, args, own, block.dtypes[part[0].weight], block.product_dtype)
    made = {linear: block.quantize(linear, Q, prefix) for linear, Q in zip(part, rounded, strict=True)}
    return replace(block, quantized={**block.quantized, **made})


def made_up(each: Alone, floats: Block, part: Sequence[Linear], quantizer: Quantizer, seen: SequentialRunner) -> Block:
    """Return the block of a unit with weights of linears behind it that make up for its error.

    They are what the quantizer would round, and stay in floating point.
    """
    block, gram, first = each.block, Gram(), part[0]
    rotate = block.input_transforms[first].rotate
    inputs = each.rows.inputs(block.segment, first, block.overrides())
    for x, y in zip(inputs, seen.inputs(block.segment, first, floats.overrides()), strict=True):
        gram.update(rotate(x), rotate(y), dtype=block.product_dtype)
    if not gram.rows:
        return block
    weights = quantizer.unrounded([block.weight(linear) for linear in part], gram)
    return replace(
        block, weights=block.weights | {x.weight: x.as_out_in(W) for x, W in zip(part, weights, strict=True)}
    )
