"""The recipe's patterns say which linears are quantized, and to which scheme; they match the paths of modules."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Protocol

from quantize.errors import UsageError
from quantize.formats import check_scheme, get_format
from quantize.graph.linears import Linear
from quantize.graph.program import Program
from quantize.recipe.fields import LayerArgs
from quantize.recipe.patterns import matches, require_match
from quantize.recipe.recipe import Recipe, default_scheme
from quantize.scheme.scheme import TABLE_SCHEME, Scheme

TOWER = "images or sound pass through it beside the language model; an entry of `layers` quantizes it"


class HasScheme(Protocol):
    """What the recipe's patterns ask of a linear: its path, its weight's name, and the number of its columns."""

    @property
    def path(self) -> str:
        """The path of its module."""

    @property
    def weight(self) -> str:
        """The name of its weight."""

    @property
    def columns(self) -> int:
        """The number of its input channels."""


def resolve_ignore(recipe: Recipe, head: Linear | None, linears: Sequence[Linear], program: Program) -> Recipe:
    """Return the recipe with one list `ignore`, which has its own patterns and the caller's.

    By default it names the linear that scores the vocabulary, `head`, if there is one and no entry of `layers` gives it
    a scheme; `choose_tables` then says whether that linear is held in 8 bits or stays in floating point. It also names
    the linears that choose experts, and those of towers of images or sound beside a language model, without those that
    an entry of `layers` matches.

    Raises:
        UsageError: a pattern of `layers` matches nothing.
    """
    ignore, paths = recipe.ignore, [linear.path for linear in linears]
    for found in recipe.layers:
        require_match("layers", found.match, paths)
    if ignore is None:
        entry = entry_for(recipe, head.path) if head else None
        ignore = (head.path,) if head and (entry is None or entry.scheme is None) else ()
        apart = program.routers | (program.towers if head else frozenset())
        ignore += tuple(path for path in paths if path in apart and entry_for(recipe, path) is None)
    return recipe.model_copy(update={"ignore": ignore + recipe.ignore_also, "ignore_also": ()})


def select(
    recipe: Recipe, linears: Sequence[HasScheme], tables: Sequence[str] = (), towers: Set[str] = frozenset()
) -> tuple[dict[str, Scheme], dict[str, str]]:
    """Return the scheme of each linear to quantize, by path in order, and the reason for each weight left out.

    The patterns of `targets` and `ignore` may also match modules with `tables` of words. Linears of `towers` that are
    ignored by their path have a reason of their own.

    Raises:
        UsageError: a pattern matches nothing, an entry of `layers` decides nothing, or a group size does not divide the
            columns.
    """
    paths, ignore = [linear.path for linear in linears], recipe.ignore or ()
    for kind, patterns in (("targets", recipe.targets), ("ignore", ignore)):
        for pattern in patterns:
            require_match(kind, pattern, [*paths, *tables])
    reasons: dict[str, str] = {}
    for path in paths:
        entry, ignored = entry_for(recipe, path), [p for p in ignore if matches(p, path)]
        if ignored:
            reasons[path] = TOWER if path in towers and ignored[0] == path else f"ignored by {ignored[0]!r}"
        elif not any(matches(p, path) for p in recipe.targets):
            reasons[path] = "not in targets"
        elif entry is not None and entry.ignore:
            reasons[path] = f"ignored by {entry.match!r} of layers"
    chosen = {path: entry_for(recipe, path) for path in paths if path not in reasons}
    for entry in recipe.layers:
        if not entry.ignore and not any(found is entry for found in chosen.values()):
            raise UsageError(
                f"layers: the entry {entry.match!r} changes nothing, as a later entry, ignore or targets decides for "
                "all linears that it matches; leave it out, or move it to the end"
            )
    columns = {linear.path: linear.columns for linear in linears}
    schemes = {path: scheme_for(recipe, entry, columns[path]) for path, entry in chosen.items()}
    check_groups(recipe, schemes, linears)
    return schemes, {linear.weight: reasons[linear.path] for linear in linears if linear.path in reasons}


def entry_for(recipe: Recipe, path: str) -> LayerArgs | None:
    """Return the last entry of `layers` that matches a module, or None."""
    return next((entry for entry in reversed(recipe.layers) if matches(entry.match, path)), None)


def scheme_for(recipe: Recipe, entry: LayerArgs | None, columns: int) -> Scheme:
    """Return the scheme of a linear of `columns` inputs, which an entry decides; without one it is the recipe's.

    A group size that nobody asked for and that does not divide the columns gives way to a fallback.
    """
    base, size, fallbacks = before_fallback(recipe, entry)
    if size and columns % size:
        size = next((other for other in fallbacks if not other or columns % other == 0), size)
    if size == base.weights.group_size:
        return base
    weights = base.weights.model_copy(update={"group_size": size})
    try:
        return check_scheme(base.model_copy(update={"weights": weights}))
    except ValueError as error:
        where = "" if entry is None else f"layers: {entry.match!r}: "
        raise UsageError(f"recipe: {where}{error}") from None


def before_fallback(recipe: Recipe, entry: LayerArgs | None) -> tuple[Scheme, int, tuple[int, ...]]:
    """Return the scheme that an entry names, the group size that holds there, and those that may take its place."""
    base, fallbacks = recipe.linear_scheme, recipe.fallback_group_sizes
    if entry is not None and entry.scheme is not None:
        base, fallbacks = default_scheme(entry.scheme)
    if entry is not None and entry.group_size is not None:
        return base, entry.group_size, ()
    return base, base.weights.group_size, fallbacks


def describe_fallbacks(recipe: Recipe, schemes: Mapping[str, Scheme], linears: Iterable[HasScheme]) -> list[str]:
    """Return a sentence for each number of columns that a default group size does not divide."""
    taken: Counter[tuple[int, int, int]] = Counter()
    for linear in (x for x in linears if schemes.get(x.path, TABLE_SCHEME) != TABLE_SCHEME):
        _, wanted, _ = before_fallback(recipe, entry_for(recipe, linear.path))
        size = schemes[linear.path].weights.group_size
        taken[linear.columns, wanted, size] += wanted != size
    return [
        f"groups of {wanted} do not divide the {columns} columns of {count} linears, which take "
        f"{f'groups of {size}' if size else 'one scale for each output channel'}"
        for (columns, wanted, size), count in sorted(taken.items())
        if count
    ]


def check_groups(recipe: Recipe, schemes: Mapping[str, Scheme], linears: Sequence[HasScheme]) -> None:
    """Check that the group size of each linear divides its columns."""
    sizes = {path: scheme.weights.group_size for path, scheme in schemes.items()}
    odd = [x for x in linears if (size := sizes.get(x.path)) and x.columns % size]
    if odd:
        first, scheme = odd[0], schemes[odd[0].path]
        more = f" and of {len(odd) - 1} more" if len(odd) > 1 else ""
        advice = "give a --group-size that does, 0 for per-channel weights, or --ignore it"
        if get_format(scheme.weights.format).group_size is not None:
            advice = f"leave out with --ignore what {scheme.label} does not fit"
        elif entry_for(recipe, first.path) is not None:
            advice = "give its entry of layers a group_size that does, or 0 for per-channel weights"
        raise UsageError(
            f"the group size {sizes[first.path]} does not divide the {first.columns} columns of {first.path}{more}; "
            f"{advice}"
        )
