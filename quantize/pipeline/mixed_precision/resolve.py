"""A recipe with `average_bits` becomes one with an entry of `layers` for each linear that takes other bits."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from quantize.pipeline.bit_options import Option, Unit, units_of
from quantize.pipeline.context import RunContext
from quantize.pipeline.mixed_precision.allocate import allocate
from quantize.pipeline.mixed_precision.measure import measure
from quantize.pipeline.plan import Plan, made_anew
from quantize.pipeline.prepare import Prepared
from quantize.recipe.fields import LayerArgs
from quantize.recipe.patterns import EXPRESSION, matches


def resolve_bits(prepared: Prepared, context: RunContext) -> tuple[Plan, dict[str, Any]]:
    """Return the plan whose linears lose least within the budget, and the manifest's entry, {} without a budget.

    The plan's recipe says by `layers` what was chosen and has no budget any more, so that it gives the same artifact.
    """
    plan, program, wanted = prepared.plan, prepared.program, prepared.plan.recipe.average_bits
    if wanted is None:
        return plan, {}
    units = units_of(plan, program, prepared.checkpoint)
    losses: list[list[float]] = context.cached("bits", lambda: measure(prepared, units, context))
    parameters = sum(unit.parameters for unit in units)
    numbers = allocate([[o.bits for o in u.options] for u in units], losses, math.floor(wanted * parameters))
    chosen = [unit.options[number] for unit, number in zip(units, numbers, strict=True)]
    layers = (*plan.given.layers, *entries(units, chosen, [linear.path for linear in program.all_linears]))
    given = plan.given.model_copy(update={"average_bits": None, "layers": layers})
    found = made_anew(plan, program, given, plan.left_out)
    options = Counter(describe(option) for unit, option in zip(units, chosen, strict=True) for _ in unit.linears)
    stored = sum(option.bits for option in chosen) / parameters
    if context.console is not None:
        shares = ", ".join(f"{what} in {count} linears" for what, count in sorted(options.items()))
        line = f"{stored:.3f} bits for each weight, scales included: {shares}"
        context.console.print(line, soft_wrap=True, markup=False)
    return found, {"asked": wanted, "stored": stored, "linears": dict(sorted(options.items()))}


def entries(units: Sequence[Unit], chosen: Sequence[Option], paths: Sequence[str]) -> list[LayerArgs]:
    """Return the entries of `layers` for all linears that take another option than the first."""
    return [
        LayerArgs(match=only(linear.path, paths), **option.settings)
        for unit, option in zip(units, chosen, strict=True)
        for linear in unit.linears
        if option.settings
    ]


def only(path: str, paths: Sequence[str]) -> str:
    """Return a pattern that matches one of some paths alone."""
    alone = [other for other in paths if matches(path, other)] == [path]
    return path if alone else EXPRESSION + re.escape(path)


def describe(option: Option) -> str:
    """Return the name of an option's scheme, with its group size."""
    size = option.scheme.weights.group_size
    return f"{option.scheme.label} {f'in groups of {size}' if size else 'by channel'}"
