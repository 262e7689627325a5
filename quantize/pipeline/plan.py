"""Recipe and bases → what happens where, before a weight is read."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass

from quantize.errors import UsageError
from quantize.formats import get_format
from quantize.graph.analysis import find_bases
from quantize.graph.basis import Bases, Basis
from quantize.graph.linears import Linear
from quantize.graph.program import Program, Segment
from quantize.passes import PASSES, Pass
from quantize.passes.ordering import check_order
from quantize.quantizers import QUANTIZERS, Quantizer
from quantize.recipe.recipe import Recipe, validated

NO_LINEAR = "no weight of a linear"


@dataclass(frozen=True)
class Step:
    """One pass: its sites on the analysis it acts on, and the paths of the linears it may put something in front of.

    Attributes:
        surveyed: weights of linears whose inputs must be seen in the whole float model before the first block.
    """

    handler: Pass
    bases: Bases
    sites: tuple[Basis, ...]
    online: tuple[str, ...]
    surveyed: frozenset[str]


@dataclass(frozen=True)
class Plan:
    """What happens where.

    Attributes:
        recipe: resolved: every default filled in.
        steps: the passes in order.
        quantizer: how weights are rounded.
        targets: paths of the linears to quantize, in order.
        skipped: parameter → why it is not quantized.
    """

    recipe: Recipe
    steps: tuple[Step, ...]
    quantizer: Quantizer
    targets: tuple[str, ...]
    skipped: dict[str, str]

    @property
    def calibrates(self) -> bool:
        """Whether any part of it looks at data."""
        tunes = self.recipe.tune is not None
        return self.quantizer.needs_gram or tunes or any(step.handler.needs for step in self.steps)

    def calibrates_after(self, segment: Segment, program: Program) -> bool:
        """Whether anything behind a block looks at the calibration activations."""
        later = program.segments[program.segments.index(segment) + 1 :]
        return bool(later) and (
            bool(self.steps) or any(x.path in self.targets for s in later for x in program.linears(s))
        )


def make_plan(recipe: Recipe, program: Program) -> Plan:
    """Decide what happens where.

    Raises:
        UsageError: a pattern matches nothing, a group size does not divide, a pass is unknown or mis-set.
    """
    linears = [linear for segment in program.segments for linear in program.linears(segment)]
    if recipe.ignore is None:
        recipe = recipe.model_copy(update={"ignore": output_head(program, linears)})
    targets, skipped = select(recipe, linears)
    chosen = [linear for linear in linears if linear.path in targets]
    check_groups(recipe, chosen)
    handlers = [validated(lambda s=s: PASSES.make(s), f"pass {s.get('name')!r}") for s in recipe.passes]  # type: ignore[misc]
    check_order(handlers)
    for handler in handlers:
        handler.check(recipe.linear_scheme)
    quantizer = validated(lambda: QUANTIZERS.make(recipe.quantizer), "quantizer")
    quantized = {linear.weight for linear in chosen}
    reasons = {name: NO_LINEAR for name in program.parameters.values()} | program.not_replaceable | skipped
    resolved = recipe.model_copy(
        update={
            "ignore": ignored_patterns(recipe),
            "ignore_also": (),
            "passes": tuple(settings(handler) for handler in handlers),
            "quantizer": settings(quantizer),
        }
    )
    left = {name: why for name, why in reasons.items() if name not in quantized}
    return Plan(resolved, make_steps(handlers, program, chosen), quantizer, targets, left)


def settings(chosen: Pass | Quantizer) -> dict[str, object]:
    """A pass or quantizer with all its parameters, as a recipe writes it."""
    return {"name": chosen.name, **chosen.model_dump(exclude_none=True)}


def output_head(program: Program, linears: list[Linear]) -> tuple[str, ...]:
    """The last linear, if it scores the vocabulary: by default it stays in floating point."""
    sizes = {name: node.meta["val"].numel() for node, name in program.parameters.items()}
    last = linears[-1:]
    return tuple(linear.path for linear in last if sizes[linear.weight] == linear.columns * program.vocabulary)


def ignored_patterns(recipe: Recipe) -> tuple[str, ...]:
    """The recipe's patterns and those of the caller."""
    return (recipe.ignore or ()) + recipe.ignore_also


def select(recipe: Recipe, linears: list[Linear]) -> tuple[tuple[str, ...], dict[str, str]]:
    """Paths to quantize, and weights left out with the reason."""
    paths = [linear.path for linear in linears]
    ignore = ignored_patterns(recipe)
    for kind, patterns in (("targets", recipe.targets), ("ignore", ignore)):
        for pattern in patterns:
            require_match(kind, pattern, paths)
    ignored = {path: p for p in reversed(ignore) for path in paths if matches(p, path)}
    wanted = {path for path in paths if any(matches(p, path) for p in recipe.targets)}
    skipped = {
        linear.weight: f"ignored by {ignored[linear.path]!r}" if linear.path in ignored else "not in targets"
        for linear in linears
        if linear.path in ignored or linear.path not in wanted
    }
    if not wanted - ignored.keys():
        raise UsageError("targets and ignore leave no linear to quantize; name fewer in ignore or more in targets")
    return tuple(dict.fromkeys(p for p in paths if p in wanted and p not in ignored)), skipped


def matches(pattern: str, path: str) -> bool:
    """Whether a pattern names a module: its path, the end of its path, or `re:` and a full-match expression."""
    if pattern.startswith("re:"):
        return re.fullmatch(pattern[3:], path) is not None
    return path == pattern or path.endswith(f".{pattern}")


def require_match(kind: str, pattern: str, paths: list[str]) -> None:
    """A pattern that matches nothing is an error that lists near matches."""
    try:
        if any(matches(pattern, path) for path in paths):
            return
    except (re.error, OverflowError, RecursionError) as error:
        raise UsageError(f"{kind}: {pattern!r} is no regular expression: {error}") from None
    known = list(dict.fromkeys([*paths, *(path.rpartition(".")[2] for path in paths)]))
    near = difflib.get_close_matches(pattern, known, n=3, cutoff=0.4) or known[:3]
    raise UsageError(f"{kind}: {pattern!r} matches no linear; near are {', '.join(near)}")


def check_groups(recipe: Recipe, linears: list[Linear]) -> None:
    """The group size divides the input of every linear."""
    size = recipe.weights.group_size
    odd = [(linear.path, linear.columns) for linear in linears if size and linear.columns % size]
    if odd:
        path, columns = odd[0]
        more = f" and of {len(odd) - 1} more" if len(odd) > 1 else ""
        advice = "give a --group-size that does, 0 for per-channel weights, or --ignore it"
        if get_format(recipe.weights.format).group_size is not None:
            advice = f"leave out with --ignore what {recipe.scheme} does not fit"
        raise UsageError(f"the group size {size} does not divide the {columns} columns of {path}{more}; {advice}")


def make_steps(handlers: list[Pass], program: Program, linears: list[Linear]) -> tuple[Step, ...]:
    """The passes with their sites; a pass that folds gains changes the analysis of those after it."""
    steps, folded = [], frozenset[str]()
    for handler in handlers:
        step = make_step(handler, find_bases(program, folded), program, linears)
        steps.append(step)
        if handler.folds_gains:
            folded |= {basis.gain.parameter for basis in step.sites if basis.gain}
    return tuple(steps)


def make_step(handler: Pass, bases: Bases, program: Program, linears: list[Linear]) -> Step:
    """One pass with its sites: where it needs statistics, those that quantized linears read."""
    quantized, sites = {linear.weight for linear in linears}, handler.sites(bases.all)
    spanning: tuple[Basis, ...] = ()
    if handler.needs is not None:
        sites = tuple(b for b in sites if quantized & reading(b))
        spanning = tuple(b for b in sites if not in_one_segment(b, program.segments))
        sites = sites if handler.cross_block else tuple(b for b in sites if b not in spanning)
    surveyed = frozenset[str]().union(*map(reading, spanning if handler.cross_block else ()))
    online = (x.path for x in linears if handler.transforms_input(bases.reading(x.weight), x.columns))
    return Step(handler, bases, sites, tuple(dict.fromkeys(online)), surveyed)


def reading(basis: Basis) -> frozenset[str]:
    """Names of the parameters that read a basis."""
    return frozenset(edge.parameter for edge in basis.readers)


def in_one_segment(basis: Basis, segments: Iterable[Segment]) -> bool:
    """Whether one block holds all parameters of a basis, so that its statistics are at hand when it is transformed."""
    names = {edge.parameter for edge in (*basis.writers, *basis.readers)}
    return any(names <= set(segment.parameters) for segment in segments)
