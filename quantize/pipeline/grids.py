"""Weights that lie on a grid already are found before the plan is final, which must not transform or regroup them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quantize.checkpoint.checkpoint import Checkpoint
from quantize.errors import UsageError
from quantize.formats import get_format
from quantize.formats.qtensor import QTensor
from quantize.graph.linears import Linear
from quantize.graph.program import Program
from quantize.pipeline.plan import Plan, grid_fits, make_plan
from quantize.quantizers.base import grouped
from quantize.quantizers.grid import on_grid
from quantize.recipe.recipe import Recipe
from quantize.scheme.scheme import TABLE_SCHEME, ActivationArgs, Scheme, WeightArgs

ROWS, EXPERTS = 64, 2  # of each weight that are looked at before the plan; a block looks at all of it
FIRST = 4  # rows that tell most weights to lie on no grid
SIZES = (128, 64, 32, 16)  # the group sizes that are looked for, besides whole rows and the recipe's
ENOUGH = 0.5  # the share of the weights to quantize that must lie on grids, so that these decide about transforms
TRANSFORMED_BITS = 8  # integer activations of fewer bits lose more without transforms than grids are worth


@dataclass(frozen=True)
class Grid:
    """A grid on which the weight of a linear lies.

    Attributes:
        size: the largest group size that the grid has; 0 for whole rows.
        levels: how many levels it has, in words.
        held: whether the recipe's format holds it, with or without zero points as the recipe says.
        format: the format that holds it, if that is another one than the recipe's.
    """

    size: int
    levels: str
    held: bool
    format: str = ""


def plan_with_grids(recipe: Recipe, program: Program, checkpoint: Checkpoint) -> Plan:
    """Make the plan, in which linears whose weights lie on grids that their formats hold are kept as they are.

    A default group size gives way to that of the grids, and transforms stay away from kept weights. Nothing is kept if
    the grids are those of less than half of the weights. If activations are quantized and the recipe has transforms
    for them, rounding anew behind these is an alternative, or comes first if they are integers of fewer than 8 bits.

    Raises:
        UsageError: the group size that was asked for does not fit the grids; also what `make_plan` raises.
    """
    plan = make_plan(recipe, program)
    if recipe.requantize or not checkpoint.has_weights:
        return plan
    numbers = {name: node.meta["val"].numel() for node, name in program.parameters.items()}
    grids = find_grids(plan, program, checkpoint)
    found = decisive(grids, {x.path: numbers[x.weight] for x in quantized(plan, program)})
    recipe, held = with_format_of(recipe, grids) if found else (recipe, {})
    activations = recipe.activations
    if not found or not held:
        return replace(plan, note=f"{found}, which {needs(grids)}: rounded anew" if found else "")
    active = [step for step in plan.steps if activations is not None and (step.sites or step.online)]
    bits = activations.num_bits if activations is not None and activations.format == "int" else TRANSFORMED_BITS
    transforms, measured = bool(active), any(step.handler.needs is None for step in active)
    try:
        kept = make_plan(regrouped(recipe, held, plan.schemes, found), program, grids=held)
    except UsageError:
        if not transforms or bits >= TRANSFORMED_BITS:
            raise
        kept = plan
    what = "kept exactly" if kept.kept else "rounded anew, as the groups do not fit"
    kept = replace(kept, note=f"{found}: {what}")
    if not transforms:
        return kept
    if bits >= TRANSFORMED_BITS:
        why = "rounded anew behind the recipe's transforms, which lose less"
        return replace(kept, alternative=replace(plan, note=f"{found}: {why}") if kept.kept and measured else None)
    why = f"rounded anew, since {bits}-bit activations need the recipe's transforms; a recipe with passes = [] keeps it"
    return replace(plan, note=f"{found}: {why}", alternative=kept if kept.kept and measured else None)


def decisive(grids: Mapping[str, Grid], sizes: Mapping[str, int]) -> str:
    """Say on which grid weights lie, if it is those of at least half of them; '' otherwise.

    Args:
        grids: the grids of the linears whose weights lie on one, by path.
        sizes: how many weights each linear to quantize has, by path.
    """
    if not grids or sum(sizes[path] for path in grids) < ENOUGH * sum(sizes.values()):
        return ""
    return f"{len(grids)} of {len(sizes)} linears already lie on a grid of {described(grids)}"


def with_format_of(recipe: Recipe, grids: Mapping[str, Grid]) -> tuple[Recipe, dict[str, int]]:
    """Return the recipe with the format of most grids, and the group sizes of the grids that this format holds."""
    ((name, held), _), *_ = Counter((grid.format, grid.held) for grid in grids.values()).most_common(1)
    sizes = {path: grid.size for path, grid in grids.items() if grid.format == name and grid.held}
    if not name or not held:
        return recipe, sizes
    weights = {"format": name, "scale_dtype": None, **get_format(name).fixed()}
    return recipe.model_copy(update={"weights": recipe.weights.model_copy(update=weights)}), sizes


def needs(grids: Mapping[str, Grid]) -> str:
    """Say what the grids need that the recipe does not give."""
    if any(grid.format for grid in grids.values()):
        return "needs zero points and activations in floating point"
    return "needs zero points"


def quantized(plan: Plan, program: Program) -> list[Linear]:
    """Return the linears that passes and the quantizer change."""
    return [x for x in program.all_linears if plan.schemes.get(x.path, TABLE_SCHEME) != TABLE_SCHEME]


def regrouped(recipe: Recipe, held: Mapping[str, int], schemes: Mapping[str, Scheme], found: str) -> Recipe:
    """Return the recipe with the group size of grids, if its own does not fit these and is a default.

    Args:
        recipe: the recipe.
        held: the group sizes of the grids that the recipe's format holds, by path.
        schemes: the scheme of each linear, by path.
        found: what was found, for the error.

    Raises:
        UsageError: the group size was asked for.
    """
    unfit = [size for path, size in held.items() if not grid_fits(size, schemes[path].weights)]
    if not unfit or get_format(recipe.weights.format).group_size or recipe.weights.num_bits > 4:
        return recipe
    size = min(unfit)
    if not recipe.fallback_group_sizes:
        raise UsageError(
            f"the group size {recipe.weights.group_size} does not fit: {found}; give --group-size {size} or none to "
            "keep the grid, or --requantize to round the weights anew"
        )
    return recipe.model_copy(update={"weights": recipe.weights.model_copy(update={"group_size": size})})


def find_grids(plan: Plan, program: Program, checkpoint: Checkpoint) -> dict[str, Grid]:
    """Return the grid of each linear whose weight lies on one, by path, from some rows of each weight.

    Of weights that can only be read as a whole, or lie on the hub, one for each place in a block is looked at.
    """
    known = dict[str, Grid | None]()
    costly = checkpoint.remote is not None
    places = {
        x: re.sub(r"\d+", "#", x.path) if costly or checkpoint.is_encoded(x.weight) or x.transposed else x.path
        for x in quantized(plan, program)
    }
    for linear, place in places.items():
        if place not in known:
            scheme, dtype = plan.schemes[linear.path], checkpoint.dtype_of(linear.weight)
            known[place] = grid_of(some_rows(checkpoint, linear), scheme.weights, dtype, scheme.activations)
    return {linear.path: grid for linear, place in places.items() if (grid := known[place])}


def some_rows(checkpoint: Checkpoint, linear: Linear) -> Tensor:
    """Return some rows of the weight [N, K] of a linear, or of the weights of some experts.

    Of experts that are stored one by one the first is enough, so that no stack is read whole.
    """
    source = None if linear.experts is None else checkpoint.stored(linear.weight)
    if source is not None and source.converter is not None:
        first = checkpoint.read_part(source.names[0]).float()
        if first.dim() == 2 and first.shape[1] == linear.columns:
            return first[:: max(1, len(first) // ROWS)].contiguous()
    if linear.experts is not None:
        W = linear.as_out_in(checkpoint.float_rows(linear.weight, EXPERTS))
    elif linear.transposed:
        W = linear.as_out_in(checkpoint.float_tensor(linear.weight))
    else:
        return checkpoint.float_rows(linear.weight, ROWS)
    return W[:: max(1, len(W) // ROWS)].contiguous()


def grid_of(W: Tensor, args: WeightArgs, dtype: torch.dtype, activations: ActivationArgs | None = None) -> Grid | None:
    """Return the grid of the weight of which W [R, K] are some rows, with the largest groups that it has; or None.

    Sixteen levels without zero among them are held with zero points, if activations stay in floating point.
    """
    number_format, columns = get_format(args.format), W.shape[1]
    free = args.model_copy(update={"symmetric": number_format.element != "int"})
    if number_format.element == "int" and args.num_bits > 4 and (found := on_grid(W, args, dtype)) is not None:
        return Grid(args.group_size, levels(found), held=True)  # few weights of a group need not tell its step
    sizes = {args.group_size or columns} | (set() if number_format.group_size else {columns, *SIZES})
    rising = sorted(size for size in sizes if columns % size == 0)
    if not rising or on_grid(W[:: max(1, len(W) // FIRST)], sized(free, rising[0], columns), dtype) is None:
        others = args.format == "int" and args.num_bits == 4
        return without_zero(W, args, dtype, activations is None and not args.symmetric) if others else None
    for size in reversed(rising):
        own = sized(free, size, columns)
        if (found := on_grid(W, own, dtype)) is not None:
            held = args.symmetric == free.symmetric or on_grid(W, sized(args, size, columns), dtype) is not None
            return Grid(own.group_size, levels(found), held)
    return None


def without_zero(W: Tensor, args: WeightArgs, dtype: torch.dtype, held: bool) -> Grid | None:
    """Return the grid of rows [R, K] that lie on 16 equal levels in groups, of which none is zero, or None."""
    few = W[:: max(1, len(W) // FIRST)]
    for size in (size for size in SIZES if W.shape[1] % size == 0):
        own = args.model_copy(update={"format": "q4_1", "symmetric": False, "group_size": size, "scale_dtype": None})
        if on_grid(few, own, dtype) is not None and on_grid(W, own, dtype) is not None:
            return Grid(size, "16 levels without zero", held, "q4_1")
    return None


def sized(args: WeightArgs, size: int, columns: int) -> WeightArgs:
    """Return settings with another group size, 0 for whole rows."""
    return args.model_copy(update={"group_size": 0 if size == columns else size})


def levels(found: QTensor) -> str:
    """Return what levels a weight has, in words."""
    if get_format(found.args.format).element != "int":
        return f"{found.args.format} values"
    q = grouped(found.unpack(), found.args).int()
    return f"{int((q.amax(-1) - q.amin(-1)).max()) + 1} levels"


def described(grids: Mapping[str, Grid]) -> str:
    """Return the grid that most linears have, in words."""
    (size, _), _ = Counter((grid.size, grid.held) for grid in grids.values()).most_common(1)[0]
    most = max((grid.levels for grid in grids.values()), key=lambda words: (len(words), words))
    return f"{most} {f'in groups of {size}' if size else 'in each row'}"
