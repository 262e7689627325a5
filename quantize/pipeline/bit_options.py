"""Linears that read the same input are decided together, and may take other groups than the recipe's, or more bits."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from quantize.checkpoint.checkpoint import Checkpoint
from quantize.errors import UsageError
from quantize.formats import get_format
from quantize.graph.linears import Linear, by_input
from quantize.graph.program import Program
from quantize.pipeline.layer_schemes import entry_for, scheme_for
from quantize.pipeline.plan import Plan
from quantize.quantizers.rtn import quantize_on_meta
from quantize.recipe.fields import LayerArgs
from quantize.recipe.recipe import Recipe
from quantize.scheme.scheme import TABLE_SCHEME, Scheme

GROUP_SIZES = (0, 128, 64, 32)
WIDER = (LayerArgs(match="", scheme="W8A8"),)
WIDER_WEIGHTS = (LayerArgs(match="", scheme="W4A16"), LayerArgs(match="", scheme="W8A16"))


@dataclass(frozen=True)
class Option:
    """A scheme that linears may take.

    Attributes:
        settings: what an entry of the recipe's `layers` says of it; {} for the recipe's own scheme.
        scheme: the scheme.
        bits: what the weights take as they are stored, with scales and zero points.
    """

    settings: Mapping[str, Any]
    scheme: Scheme
    bits: int


@dataclass(frozen=True)
class Unit:
    """Linears that take the same option: those that read the same input, which runtimes join to one product.

    Attributes:
        linears: the linears.
        parameters: the number of their weights.
        options: the options, the recipe's own scheme first.
    """

    linears: tuple[Linear, ...]
    parameters: int
    options: tuple[Option, ...]


def units_of(plan: Plan, program: Program, checkpoint: Checkpoint) -> list[Unit]:
    """Return the units in order; linears that an entry of `layers` decides, or that keep a grid, are in none.

    Raises:
        UsageError: the recipe's numbers are FP4, whose groups are fixed, or nothing is left.
    """
    if get_format(plan.recipe.weights.format).element == "e2m1":
        raise UsageError(
            f"recipe: average_bits chooses among integers and code books, and the weights are {plan.recipe.scheme}; "
            "leave it out, or give an integer scheme"
        )
    if program.export_error:
        raise UsageError(
            "recipe: average_bits measures on the model's graph, and this model cannot be exported; leave it out, and "
            "give schemes by [[layers]]"
        )
    shapes = {name: node.meta["val"].shape for node, name in program.parameters.items()}
    found = list[Unit]()
    for segment in program.segments:
        free = [x for x in program.linears(segment) if is_free(x, plan)]
        for sharing in by_input(free):
            sizes = [math.prod(shapes[x.weight]) for x in sharing]
            kinds = [(x, size, checkpoint.dtype_of(x.weight)) for x, size in zip(sharing, sizes, strict=True)]
            options = [
                Option(how, scheme, sum(stored_bits(*kind, scheme) for kind in kinds))
                for how, scheme in schemes_for(plan.recipe, sharing[0].columns, plan.schemes[sharing[0].path])
            ]
            found.append(Unit(tuple(sharing), sum(sizes), tuple(options)))
    if not found:
        raise UsageError("recipe: average_bits has no linear to decide for, as layers or grids decide for all")
    return found


def is_free(linear: Linear, plan: Plan) -> bool:
    """Return whether nothing but the recipe's tables decides the scheme of a linear."""
    scheme = plan.schemes.get(linear.path)
    decided = linear.path in plan.kept or entry_for(plan.recipe, linear.path) is not None
    return scheme is not None and scheme != TABLE_SCHEME and not decided


def schemes_for(recipe: Recipe, columns: int, base: Scheme) -> list[tuple[dict[str, Any], Scheme]]:
    """Return the schemes of linears of `columns` inputs, each with what an entry of `layers` says of it."""
    found: list[tuple[dict[str, Any], Scheme]] = [({}, base)]
    for size in GROUP_SIZES:
        if size != base.weights.group_size and (not size or columns % size == 0):
            entry = LayerArgs(match="", group_size=size)
            found.append(({"group_size": size}, scheme_for(recipe, entry, columns)))
    for entry in WIDER_WEIGHTS if recipe.activations is None else WIDER:
        scheme = scheme_for(recipe, entry, columns)
        if scheme.weights.num_bits > base.weights.num_bits:
            found.append(({"scheme": entry.scheme}, scheme))
    return found


def stored_bits(linear: Linear, weights: int, dtype: torch.dtype, scheme: Scheme) -> int:
    """Return the bits that weights of a dtype take once they are quantized, with scales and zero points."""
    shape = torch.Size((weights // linear.columns, linear.columns))
    return 8 * sum(x.nbytes for x in quantize_on_meta(shape, dtype, scheme.weights, linear.experts).tensors().values())


def check_average_bits(plan: Plan, program: Program, checkpoint: Checkpoint) -> None:
    """Check that the recipe's budget can be kept.

    Raises:
        UsageError: it cannot; the message says what is the least.
    """
    wanted = plan.recipe.average_bits
    if wanted is None:
        return
    units = units_of(plan, program, checkpoint)
    least = sum(min(option.bits for option in unit.options) for unit in units) / sum(u.parameters for u in units)
    if wanted < least:
        other = ", or the scheme W3A16" if plan.recipe.scheme == "W4A16" else ""
        raise UsageError(
            f"recipe: average_bits is {wanted:g}, and these weights take {least:.3f} bits at least, scales included; "
            f"give {math.ceil(100 * least) / 100:g} or more{other}"
        )
