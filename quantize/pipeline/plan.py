"""A plan is made from the recipe and the bases before a weight is read: it says what happens where."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from quantize.errors import UsageError
from quantize.graph.allowed_transforms import AllowedTransforms
from quantize.graph.analysis import admissible_bases, find_bases, origin_of
from quantize.graph.basis import Bases, Basis
from quantize.graph.linears import Linear
from quantize.graph.program import Program, Segment
from quantize.passes import PASSES, Pass
from quantize.passes.ordering import check_order
from quantize.passes.rotate import Rotate
from quantize.pipeline.body import Body, nothing_left, reasons_in_float
from quantize.pipeline.layer_schemes import resolve_ignore, select
from quantize.pipeline.tables import (
    choose_tables,
    module_of,
    outside_of_body,
    scoring_linear,
    set_apart,
    tables_of_words,
)
from quantize.quantizers import QUANTIZERS, Quantizer
from quantize.recipe.recipe import Recipe
from quantize.recipe.validation import validated
from quantize.scheme.scheme import TABLE_SCHEME, Scheme, WeightArgs


@dataclass(frozen=True)
class Step:
    """One pass with its sites, the analysis it acts on, and the linears in front of which it may put something.

    Attributes:
        surveyed: the weights of linears whose inputs must be seen in the whole float model before the first block.
    """

    handler: Pass
    bases: Bases
    sites: tuple[Basis, ...]
    online: tuple[str, ...]
    surveyed: frozenset[str]

    @property
    def judged(self) -> bool:
        """Whether the pass is left out where plain rounding loses clearly less without it."""
        return isinstance(self.handler, Rotate) and self.handler.where_useful


@dataclass(frozen=True)
class LeftOut:
    """Rotations that a plan leaves out.

    Attributes:
        bases: the bases that are not rotated, as `origin_of` names them.
        linears: the paths of linears in front of which nothing rotates.
    """

    bases: frozenset[tuple[str, int, int]] = frozenset()
    linears: frozenset[str] = frozenset()

    def record(self) -> dict[str, list[str]]:
        """Return an entry for the manifest: the first writer of each basis, and the linears."""
        return {"bases": sorted(parameter for parameter, *_ in self.bases), "linears": sorted(self.linears)}


@dataclass(frozen=True)
class Plan:
    """The decisions of a run.

    Attributes:
        given: the recipe as it was given.
        recipe: the resolved recipe, with every default filled in.
        steps: the passes in order.
        quantizer: the quantizer that rounds weights.
        schemes: the scheme of each linear to quantize, by path, in order; other linears stay in floating point.
        reader_schemes: the same schemes by the name of the weight, which is how a basis names its readers, without
            that of the linear that scores the vocabulary, for which no pass does anything.
        tables: the names of the tables of words that are held in 8 bits.
        skipped: the parameters that are not quantized, each with the reason.
        body: what share of the model is quantized.
        left_out: the rotations that are left out.
        kept: the path of each linear whose weight lies on a grid and is kept → the group size of the grid, 0 for rows.
        note: what was found of such grids, and what becomes of them; '' if none was found.
        alternative: another plan for weights on grids, which may lose less (`grid_choice.py`); None if there is none.
    """

    given: Recipe
    recipe: Recipe
    steps: tuple[Step, ...]
    quantizer: Quantizer
    schemes: dict[str, Scheme]
    reader_schemes: dict[str, Scheme]
    skipped: dict[str, str]
    body: Body
    tables: tuple[str, ...] = ()
    left_out: LeftOut = LeftOut()
    kept: Mapping[str, int] = field(default_factory=dict)
    note: str = ""
    alternative: Plan | None = None

    @functools.cached_property
    def default_scheme(self) -> Scheme:
        """The scheme of most linears, which an artifact names once."""
        return Counter(self.schemes.values()).most_common(1)[0][0]

    @property
    def calibrates(self) -> bool:
        """Whether any part of the plan uses data."""
        judged = self.recipe.tune is not None or self.recipe.prune is not None
        return self.quantizer.needs_gram or judged or any(step.handler.needs for step in self.steps)

    def calibrates_after(self, segment: Segment, program: Program) -> bool:
        """Return whether anything after a block uses the calibration activations."""
        later = program.segments[program.segments.index(segment) + 1 :]
        return bool(later) and (
            bool(self.steps) or any(x.weight in self.reader_schemes for s in later for x in program.linears(s))
        )


def make_plan(
    recipe: Recipe,
    program: Program,
    left_out: LeftOut = LeftOut(),
    grids: Mapping[str, int] = MappingProxyType({}),
) -> Plan:
    """Make the plan, without some rotations.

    Args:
        recipe: the recipe.
        program: the program.
        left_out: the rotations that are left out.
        grids: the path of each linear whose weight lies on a grid of its format → the group size of the grid, 0 for
            rows. If the linear's groups fit the grid it is kept: no pass changes its weight.

    Raises:
        UsageError: a pattern matches nothing, or all linears; a group size does not divide; or a pass is unknown or has
            wrong settings.
    """
    linears = program.all_linears
    head, given, words = scoring_linear(program, linears), recipe, list(tables_of_words(program).values())
    recipe = resolve_ignore(set_apart(recipe, head, words), head, linears, program)
    schemes, skipped = select(recipe, linears, words, program.towers)
    reasons = reasons_in_float(program) | skipped
    if not schemes:
        raise UsageError(nothing_left(program, reasons))
    chosen = [linear for linear in linears if linear.path in schemes]
    handlers = [validated(lambda s=s: PASSES.make(s), f"pass {s.get('name')!r}") for s in recipe.passes]  # type: ignore[misc]
    check_order(handlers)
    for handler in handlers:
        for scheme in dict.fromkeys(schemes.values()):
            handler.check(scheme)
    quantizer = validated(lambda: QUANTIZERS.make(recipe.quantizer), "quantizer")
    reader_schemes = {linear.weight: schemes[linear.path] for linear in chosen}
    kept = {path: size for path, size in grids.items() if path in schemes and grid_fits(size, schemes[path].weights)}
    untouched = frozenset(linear.weight for linear in chosen if linear.path in kept)
    steps = make_steps(handlers, program, chosen, left_out, untouched)
    tables, with_head = choose_tables(given, program, head, changed_by(steps) | reader_schemes.keys())
    held = [*map(module_of, tables)]
    if head and with_head:
        schemes[head.path] = TABLE_SCHEME
        recipe = recipe.model_copy(update={"ignore": tuple(p for p in recipe.ignore or () if p != head.path)})
        held.append(head.path)
    resolved = recipe.model_copy(
        update={
            "passes": tuple(settings(handler) for handler in handlers),
            "quantizer": settings(quantizer),
            "tables": tuple(held),
        }
    )
    done = {*reader_schemes, *tables, *([head.weight] if head and with_head else [])}
    left = {name: why for name, why in reasons.items() if name not in done}
    body = Body.of(program, left, {*outside_of_body(program), *([head.weight, head.bias or ""] if head else [])})
    return Plan(given, resolved, steps, quantizer, schemes, reader_schemes, left, body, tables, left_out, kept)


def made_anew(plan: Plan, program: Program, given: Recipe, left_out: LeftOut) -> Plan:
    """Return the plan of another recipe, without some rotations, with the grids, the note and the prefix of a plan."""
    found = make_plan(given, program, left_out, plan.kept)
    return replace(found, note=plan.note, recipe=found.recipe.model_copy(update={"prefix": plan.recipe.prefix}))


def grid_fits(size: int, args: WeightArgs) -> bool:
    """Return whether groups of weights lie within the groups of a grid, of which 0 are whole rows."""
    return not size or bool(args.group_size and size % args.group_size == 0)


def changed_by(steps: Iterable[Step]) -> set[str]:
    """Return the names of the parameters that passes change, which then differ from what they were tied to."""
    return {name for step in steps for basis in step.sites for name in changing(basis)}


def settings(chosen: Pass | Quantizer) -> dict[str, object]:
    """Return a pass or quantizer with all its parameters, as a recipe writes it."""
    return {"name": chosen.name, **chosen.model_dump(exclude_none=True)}


def make_steps(
    handlers: list[Pass], program: Program, linears: list[Linear], left_out: LeftOut, untouched: frozenset[str]
) -> tuple[Step, ...]:
    """Return the passes with their sites; a pass that folds gains changes the analysis of the passes after it.

    The parameters `untouched` stay as they are.
    """
    steps, folded = [], frozenset[str]()
    for handler in handlers:
        step = make_step(handler, find_bases(program, folded), program, linears, untouched)
        sites = freeing(step.sites, program, left_out, untouched) if handler.folds_gains else step.sites
        step = replace(step, sites=sites)
        step = without(step, left_out) if step.judged else step
        steps.append(step)
        if handler.folds_gains:
            folded |= {basis.gain.parameter for basis in step.sites if basis.gain}
    return tuple(steps)


def without(step: Step, left_out: LeftOut) -> Step:
    """Return a step without the rotations that are left out."""
    sites = tuple(basis for basis in step.sites if origin_of(basis) not in left_out.bases)
    return replace(step, sites=sites, online=tuple(path for path in step.online if path not in left_out.linears))


def freeing(
    sites: Iterable[Basis], program: Program, left_out: LeftOut, untouched: frozenset[str]
) -> tuple[Basis, ...]:
    """Return those of some bases behind norm gains whose folding lets rotations through the norm.

    Elsewhere a gain does more good where it is: it mostly is small for massive channels, which otherwise reach what
    reads the norm (Gemma 3, whose residual stream admits no rotation, is nearer to the float model by RTN without).
    """
    rotatable = (b for b in admissible_bases(program) if AllowedTransforms.CENTRED_ORTHOGONAL in b.allowed)
    kept = (basis for basis in rotatable if not untouched & changing(basis) and origin_of(basis) not in left_out.bases)
    freed = {gain for basis in kept for gain in basis.gains}
    return tuple(basis for basis in sites if basis.gain and basis.gain.parameter in freed)


def make_step(handler: Pass, bases: Bases, program: Program, linears: list[Linear], untouched: frozenset[str]) -> Step:
    """Return one pass with its sites; if it needs statistics, only sites that quantized linears read.

    The parameters `untouched` are changed neither by the pass nor by what it puts in front of a linear.
    """
    quantized = {linear.weight for linear in linears}
    sites = tuple(basis for basis in handler.sites(bases.all) if not untouched & changing(basis))
    spanning: tuple[Basis, ...] = ()
    if handler.needs is not None:
        sites = tuple(b for b in sites if quantized & reading(b))
        spanning = tuple(b for b in sites if not in_one_segment(b, program.segments))
        sites = sites if handler.cross_block else tuple(b for b in sites if b not in spanning)
    surveyed = frozenset[str]().union(*map(reading, spanning if handler.cross_block else ()))
    absorbs = handler.legal is not AllowedTransforms.NONE  # what goes in front of a linear, into its weight
    inputs = (x for x in linears if not (absorbs and x.weight in untouched))
    online = (x.path for x in inputs if handler.transforms_input(bases.reading(x.weight), x.columns))
    return Step(handler, bases, sites, tuple(dict.fromkeys(online)), surveyed)


def changing(basis: Basis) -> frozenset[str]:
    """Return the names of the parameters that a transform of a basis changes."""
    return frozenset(edge.parameter for edge in (*basis.writers, *basis.readers))


def reading(basis: Basis) -> frozenset[str]:
    """Return the names of the parameters that read a basis."""
    return frozenset(edge.parameter for edge in basis.readers)


def in_one_segment(basis: Basis, segments: Iterable[Segment]) -> bool:
    """Return whether one block holds all parameters of a basis, so that its statistics are known in time."""
    return any(changing(basis) <= set(segment.parameters) for segment in segments)
