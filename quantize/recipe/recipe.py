"""The declarative input: what to do to a model, as data, never code."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Self, TypeVar

import tomli_w
from pydantic import Field, ValidationError, model_validator

from quantize.errors import LONGEST, UsageError, shown
from quantize.recipe.scheme import (
    FP4_GROUP_SIZES,
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
FOLDER = resources.files("quantize.recipes")


class PrefixArgs(Data):
    """Tokens that run in front of every sequence (PrefixQuant, arXiv 2410.05265): ids, or `search` for them.

    Attributes:
        tokens: ids ≥ 0, in order.
        search: take those that carry massive activations on the calibration data.
    """

    tokens: tuple[Annotated[int, Field(ge=0)], ...] = ()
    search: bool = False

    @model_validator(mode="after")
    def one_of_both(self) -> Self:
        """Either is given, not both."""
        if bool(self.tokens) == self.search:
            raise ValueError("give either tokens, a list of ids, or search = true")
        return self


class LayerArgs(Data):
    """What some linears are quantized to in place of the recipe's scheme.

    Attributes:
        match: the linears: a module path, the end of one, or `re:` and a regular expression.
        scheme: another scheme's name, whose default tables hold; None keeps the recipe's.
        group_size: columns that share a scale; None keeps the scheme's.
        ignore: leave them in floating point.
    """

    match: str
    scheme: SchemeName | None = None
    group_size: int | None = Field(None, ge=0)
    ignore: bool = False

    @model_validator(mode="after")
    def says_something(self) -> Self:
        """It changes something, and does not ignore what it changes."""
        changes = self.scheme is not None or self.group_size is not None
        if changes == self.ignore:
            raise ValueError("give either ignore = true, or scheme or group_size or both")
        return self


class Recipe(Data):
    """Everything that determines an artifact, beside model and data.

    Attributes:
        scheme: the field's name; it fixes the bits and the format of `weights` and `activations`.
        weights, activations: how they are quantized.
        kv_cache: how keys and values are; None leaves them in floating point.
        targets: linears to quantize: a module path, the end of one, or `re:` and a regular expression.
        ignore: linears to leave alone; None ignores the one that scores the vocabulary, where there is one.
        ignore_also: more of them.
        layers: linears with schemes of their own; of several entries that match a linear the last one counts.
        nsamples, seqlen: calibration windows, and tokens in each.
        seed: of every random choice.
        prefix: tokens in front of every sequence, whose activations are not quantized; None for none.
        passes: outlier handlers in order, each `{name, parameters…}`.
        quantizer: how weights are rounded, `{name, parameters…}`.
        tune: tune the rounding of each block afterwards; None does not.
    """

    scheme: SchemeName
    weights: WeightArgs
    activations: ActivationArgs | None = None
    kv_cache: KVCacheArgs | None = None
    targets: tuple[str, ...] = ("re:.*",)
    ignore: tuple[str, ...] | None = None
    ignore_also: tuple[str, ...] = ()
    layers: tuple[LayerArgs, ...] = ()
    nsamples: int = Field(128, ge=1)
    seqlen: int = Field(512, ge=2)
    seed: int = Field(0, ge=0)
    prefix: PrefixArgs | None = None
    passes: tuple[dict[str, Any], ...] = ()
    tune: TuneArgs | None = None
    quantizer: dict[str, Any] = Field(default_factory=lambda: {"name": "rtn"})

    @property
    def linear_scheme(self) -> Scheme:
        """What a quantized linear is made with."""
        return Scheme(weights=self.weights, activations=self.activations)

    @property
    def prefix_tokens(self) -> tuple[int, ...]:
        """Ids of the prefix; () for none, or before they are found."""
        return self.prefix.tokens if self.prefix else ()

    def to_toml(self) -> str:
        """The recipe as TOML text."""
        return tomli_w.dumps(self.model_dump(exclude={"ignore_also"}, exclude_none=True, mode="json"))


def load_recipe(
    scheme: str | None,
    changes: Path | Mapping[str, Any] | None,
    *,
    ignore: tuple[str, ...] = (),
    group_size: int | None = None,
    **settings: int | None,
) -> Recipe:
    """The default recipe of a scheme, changed by a recipe, changed by single settings.

    Args:
        scheme: scheme name; None takes the recipe's.
        changes: a TOML file, the name of a recipe of the package, or what stands in one: tables are merged into the
            default, lists replace those of the default.
        ignore: further linears to leave alone.
        group_size: columns that share a scale.
        settings: `nsamples`, `seqlen`, `seed`; None leaves the recipe's.

    Raises:
        UsageError: unknown scheme, unreadable or invalid recipe.
    """
    given = read_toml(changes) if isinstance(changes, Path) else dict(changes or {})
    name = scheme or given.get("scheme")
    if name is None:
        raise UsageError(f"give --scheme, one of {', '.join(SCHEME_NAMES)}, or a recipe with one")
    if name not in SCHEME_NAMES:
        raise UsageError(f"unknown scheme {name!r}; known are {', '.join(SCHEME_NAMES)}")
    default = tomllib.loads(shipped(name.lower()))
    single = {key: value for key, value in settings.items() if value is not None} | {"scheme": name}
    table = {} if group_size is None else {"weights": {"group_size": group_size}}
    merged = merge(merge(merge(default, given), single), table)
    recipe = validated(lambda: Recipe(**merged), f"recipe {changes}" if isinstance(changes, Path) else "recipe")
    check_bits(recipe)
    return recipe.model_copy(update={"ignore_also": recipe.ignore_also + ignore})


def default_scheme(name: str) -> Scheme:
    """The tables `weights` and `activations` of a scheme's default recipe."""
    default = tomllib.loads(shipped(name.lower()))
    return Scheme(weights=default["weights"], activations=default.get("activations"))


def read_toml(path: Path) -> dict[str, Any]:
    """Settings of a recipe file, or of the one that comes with the package and has this name."""
    try:
        text = path.read_text() if path.suffix or path.exists() else shipped(str(path))
        return tomllib.loads(text)
    except (OSError, KeyError):
        raise UsageError(f"no such recipe: {path}; give a .toml file or one of {', '.join(names())}") from None
    except (ValueError, RecursionError) as error:  # TOMLDecodeError, of UTF-8, numbers of thousands of digits
        raise UsageError(f"recipe {path} is no TOML: {error}") from None


def names() -> list[str]:
    """The recipes of the package."""
    return sorted(file.name.removesuffix(".toml") for file in FOLDER.iterdir() if file.name.endswith(".toml"))


def shipped(name: str) -> str:
    """Text of a recipe of the package.

    Raises:
        KeyError: there is none of that name.
    """
    if name not in names():
        raise KeyError(name)
    return FOLDER.joinpath(f"{name}.toml").read_text()


def merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with `changes`; tables merge key by key, but one that names its method replaces the whole table."""
    result = dict(base)
    for key, value in changes.items():
        both = isinstance(value, Mapping) and isinstance(base.get(key), Mapping) and "name" not in value
        result[key] = merge(base[key], value) if both else value
    return result


def validated(make: Callable[[], T], what: str) -> T:
    """Call `make`, turning pydantic's report into one sentence.

    Raises:
        UsageError: names the first wrong key.
    """
    try:
        return make()
    except ValidationError as error:
        first = error.errors()[0]
        keys = (str(part) for part in first["loc"])
        where = ".".join(key for key in keys if key.isidentifier() or key.isdigit())  # without the members of a union
        where = where if len(where) < LONGEST else f"{where[:LONGEST]}…"
        if first["type"] == "value_error":  # a sentence of our own
            raise UsageError(f"{what}: {where}: {first['ctx']['error']}") from None
        raise UsageError(f"{what}: {where}: {first['msg'].lower()} (got {shown(first['input'])})") from None


def check_bits(recipe: Recipe) -> None:
    """The tables agree with the scheme's name.

    Raises:
        UsageError: says what the name stands for.
    """
    fp4 = recipe.scheme.lower() in FP4_GROUP_SIZES
    expected = recipe.scheme.lower() if fp4 else "int"
    formats = [args.format for args in (recipe.weights, recipe.activations) if args]
    if set(formats) != {expected}:
        raise UsageError(
            f"recipe: {recipe.scheme} stands for the format {expected}, the tables say {' and '.join(formats)}; "
            "leave the format out"
        )
    weights, _, activations = ("4", "", "4") if fp4 else recipe.scheme[1:].partition("A")
    found = 16 if recipe.activations is None else recipe.activations.num_bits
    if (recipe.weights.num_bits, found) != (int(weights), int(activations)):
        raise UsageError(
            f"recipe: {recipe.scheme} stands for {weights}-bit weights and {activations}-bit activations, "
            f"the tables say {recipe.weights.num_bits} and {found}"
        )
