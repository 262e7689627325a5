"""A recipe says what to do to a model. It is data and never code."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Self, TypeVar

import tomli_w
from pydantic import AfterValidator, Field, ValidationError, model_validator

from quantize.errors import LONGEST, UsageError, shown
from quantize.formats import FORMATS, check_args, check_scheme, get_format
from quantize.recipe.files import read_recipe
from quantize.recipe.patterns import expand_patterns
from quantize.recipe.shipped import shipped
from quantize.recipe.suggestions import suggestion
from quantize.recipe.targets import recipe_for
from quantize.scheme.names import scheme_name
from quantize.scheme.scheme import (
    SCHEME_NAMES,
    ActivationArgs,
    Data,
    KVCacheArgs,
    Scheme,
    SchemeName,
    TuneArgs,
    WeightArgs,
)  # fmt: skip

T = TypeVar("T")


class PrefixArgs(Data):
    """Tokens that run in front of every sequence (PrefixQuant, arXiv 2410.05265), given as ids or searched for.

    Attributes:
        tokens: ids ≥ 0, in order.
        search: whether to take the tokens that carry massive activations on the calibration data.
    """

    tokens: tuple[Annotated[int, Field(ge=0)], ...] = ()
    search: bool = False

    @model_validator(mode="after")
    def one_of_both(self) -> Self:
        """Check that exactly one of the two is given."""
        if bool(self.tokens) == self.search:
            raise ValueError("give either tokens, a list of ids, or search = true")
        return self


class CalibrationArgs(Data):
    """What is done to the rows of calibration data before they run.

    Attributes:
        mask_id: the token that a masked-diffusion language model has in the place of tokens to find. A part of each
            row's tokens, drawn from 0.1 to 0.9, is replaced by it.
    """

    mask_id: int = Field(ge=0)


class PruneArgs(Data):
    """How many experts of a mixture are dropped before anything else happens (REAP, arXiv 2510.13999).

    Attributes:
        ratio: the part of the experts of each layer that is dropped, rounded down to whole experts.
    """

    ratio: float = Field(gt=0, lt=1)


class LayerArgs(Data):
    """A scheme for some linears, in place of the recipe's.

    Attributes:
        match: which linears: a module path, the end of one, or `re:` and a regular expression.
        scheme: the name of another scheme, whose default tables then hold; None keeps the recipe's scheme.
        group_size: the number of columns that share a scale; None keeps the scheme's.
        ignore: whether to leave the linears in floating point.
    """

    match: str
    scheme: SchemeName | None = None
    group_size: int | None = Field(None, ge=0)
    ignore: bool = False

    @model_validator(mode="after")
    def says_something(self) -> Self:
        """Check that the entry either changes something or ignores the linears."""
        changes = self.scheme is not None or self.group_size is not None
        if changes == self.ignore:
            raise ValueError("give either ignore = true, or scheme or group_size or both")
        return self


class Recipe(Data):
    """Everything that determines an artifact apart from the model and the data.

    Attributes:
        scheme: the scheme's name, which fixes the bits and the format of `weights` and `activations`.
        weights, activations: how weights and activations are quantized.
        fallback_group_sizes: the group sizes that a linear may take whose columns `weights.group_size` does not divide;
            it takes the first that does, 0 being per-channel. Without one it is refused. A group size that is asked
            for leaves none.
        kv_cache: how keys and values are quantized; None leaves them in floating point.
        targets: linears to quantize: a module path, the end of one, or `re:` and a regular expression.
        ignore: linears to leave in floating point; None leaves the one that scores the vocabulary, if there is one, and
            those that choose experts.
        ignore_also: further linears to leave in floating point.
        layers: linears with schemes of their own; if several entries match a linear, the last one counts.
        tables: tables of words, and the linear that scores the vocabulary, to hold in 8 bits: patterns as in `targets`;
            None names all that the artifact would not store as one tensor.
        nsamples, seqlen: the number of calibration windows, and the number of tokens in each.
        seed: the seed of every random choice the run makes.
        calibration: what is done to the rows of calibration data; None for nothing.
        prefix: tokens in front of every sequence, whose activations are not quantized; None for none.
        prune: how many experts of each layer are dropped; None drops none.
        passes: outlier handlers in order, each `{name, parameters…}`.
        quantizer: how weights are rounded, `{name, parameters…}`.
        tune: how the rounding of each block is tuned afterwards; None does not tune.
        requantize: whether weights that lie on a grid of the format already are rounded anew.
        calibrate_all_experts: whether each expert of a mixture is rounded on all tokens, and not only on those that the
            router sends to it.
    """

    scheme: SchemeName
    weights: Annotated[WeightArgs, AfterValidator(check_args)]
    activations: Annotated[ActivationArgs, AfterValidator(check_args)] | None = None
    fallback_group_sizes: tuple[Annotated[int, Field(ge=0)], ...] = ()
    kv_cache: KVCacheArgs | None = None
    targets: tuple[str, ...] = ("re:.*",)
    ignore: tuple[str, ...] | None = None
    ignore_also: tuple[str, ...] = ()
    layers: tuple[LayerArgs, ...] = ()
    tables: tuple[str, ...] | None = None
    nsamples: int = Field(32, ge=1)
    seqlen: int = Field(512, ge=2)
    seed: int = Field(0, ge=0)
    calibration: CalibrationArgs | None = None
    prefix: PrefixArgs | None = None
    prune: PruneArgs | None = None
    passes: tuple[dict[str, Any], ...] = ()
    tune: TuneArgs | None = None
    quantizer: dict[str, Any] = Field(default_factory=lambda: {"name": "rtn"})
    calibrate_all_experts: bool = False
    requantize: bool = False

    @property
    def linear_scheme(self) -> Scheme:
        """The scheme of the quantized linears."""
        return Scheme(weights=self.weights, activations=self.activations)

    @property
    def prefix_tokens(self) -> tuple[int, ...]:
        """The ids of the prefix; () if there is none, or if they have not been searched for yet."""
        return self.prefix.tokens if self.prefix else ()

    def to_toml(self) -> str:
        """Return the recipe as TOML text."""
        return tomli_w.dumps(self.model_dump(exclude={"ignore_also"}, exclude_none=True, mode="json"))


def load_recipe(
    scheme: str | None,
    changes: Path | Mapping[str, Any] | None,
    *,
    ignore: tuple[str, ...] = (),
    group_size: int | None = None,
    target: str | None = None,
    **settings: int | None,
) -> Recipe:
    """Load the default recipe of a scheme and change it by a recipe and then by single settings.

    Args:
        scheme: the scheme's name; None takes the recipe's.
        changes: a TOML file, the name of a shipped recipe, or the content of a recipe. Its tables are merged into the
            default; its lists replace those of the default.
        ignore: further linears to leave in floating point: names, globs, lists separated by commas, or expressions.
        group_size: the number of columns that share a scale; None leaves the recipe's.
        target: the runtime whose recipe takes the place of the scheme's default; None takes the default.
        settings: `nsamples`, `seqlen`, `seed` and `requantize`; None leaves the recipe's.

    Raises:
        UsageError: the scheme is unknown, or the recipe cannot be read or is not valid.
    """
    given = read_recipe(changes) if isinstance(changes, Path) else dict(changes or {})
    name = scheme or given.get("scheme")
    if name is None:
        raise UsageError(f"give --scheme, one of {', '.join(SCHEME_NAMES)}, or a recipe with one")
    name = scheme_name(str(name))
    if name not in SCHEME_NAMES:
        raise UsageError(f"unknown scheme {name!r}; known are {', '.join(SCHEME_NAMES)}")
    default = merge(tomllib.loads(shipped(name.lower())), format_defaults(given))
    if own := recipe_for(target, name):
        default = merge(default, tomllib.loads(shipped(own)))
    single = {key: value for key, value in settings.items() if value is not None} | {"scheme": name}
    table = {} if group_size is None else {"weights": {"group_size": group_size}}
    if table or (isinstance(given.get("weights"), Mapping) and "group_size" in given["weights"]):
        default["fallback_group_sizes"] = []
    merged = merge(merge(merge(default, given), single), table)
    recipe = validated(lambda: Recipe(**merged), f"recipe {changes}" if isinstance(changes, Path) else "recipe")
    check_bits(recipe)
    return recipe.model_copy(update={"ignore_also": (*recipe.ignore_also, *expand_patterns(ignore))})


def default_scheme(name: str) -> tuple[Scheme, tuple[int, ...]]:
    """Return a scheme's default recipe: the tables `weights` and `activations`, and the fallback group sizes."""
    default = tomllib.loads(shipped(name.lower()))
    scheme = check_scheme(Scheme(weights=default["weights"], activations=default.get("activations")))
    return scheme, tuple(default.get("fallback_group_sizes", ()))


def format_defaults(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the weights' format, if a recipe names one, says of their other settings."""
    weights = given.get("weights")
    name = weights.get("format") if isinstance(weights, Mapping) else None
    if not isinstance(name, str) or name not in FORMATS:
        return {}
    number_format = get_format(name)
    return {"weights": {**number_format.defaults, **number_format.fixed()}}


def merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Merge `changes` into `base` key by key; a table that names its method replaces the whole table."""
    result = dict(base)
    for key, value in changes.items():
        both = isinstance(value, Mapping) and isinstance(base.get(key), Mapping) and "name" not in value
        result[key] = merge(base[key], value) if both else value
    return result


def validated(make: Callable[[], T], what: str) -> T:
    """Call `make` and turn pydantic's report into one sentence.

    Raises:
        UsageError: a key is wrong; the message names the first one.
    """
    try:
        return make()
    except ValidationError as error:
        first = error.errors()[0]
        keys = (str(part) for part in first["loc"])
        where = ".".join(key for key in keys if key.isidentifier() or key.isdigit())  # without a union's members
        where = where if len(where) < LONGEST else f"{where[:LONGEST]}…"
        if first["type"] == "value_error":  # one of this package's validators, which writes a sentence
            raise UsageError(f"{what}: {where}: {first['ctx']['error']}") from None
        if first["type"] == "extra_forbidden":
            meant = suggestion(where.split("."), list(Recipe.model_fields)) if error.title == "Recipe" else ""
            raise UsageError(f"{what}: {where}: there is no such key here{meant or '; leave it out'}") from None
        raise UsageError(
            f"{what}: {where}: {first['msg'][:1].lower()}{first['msg'][1:]} (got {shown(first['input'])})"
        ) from None


def check_bits(recipe: Recipe) -> None:
    """Check that the tables agree with the scheme's name and with one another.

    Raises:
        UsageError: they do not; the message says what the name stands for.
    """
    schemes = FORMATS.keys() & {name.lower() for name in SCHEME_NAMES}  # formats that have a scheme of their own
    own, formats = recipe.scheme.lower() in schemes, [x.format for x in (recipe.weights, recipe.activations) if x]
    expected = recipe.scheme.lower() if own else "int"
    if set(formats) & schemes - {expected} or (own and set(formats) != {expected}):
        raise UsageError(
            f"recipe: {recipe.scheme} stands for the format {expected}, the tables say {' and '.join(formats)}; "
            "leave the format out"
        )
    weights, _, activations = ("4", "", "4") if own else recipe.scheme[1:].partition("A")
    found = 16 if recipe.activations is None else recipe.activations.num_bits
    if (recipe.weights.num_bits, found) != (int(weights), int(activations)):
        raise UsageError(
            f"recipe: {recipe.scheme} stands for {weights}-bit weights and {activations}-bit activations, "
            f"the tables say {recipe.weights.num_bits} and {found}"
        )
    try:
        check_scheme(recipe.linear_scheme)
    except ValueError as error:
        raise UsageError(f"recipe: {error}") from None
