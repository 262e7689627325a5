"""The declarative input: what to do to a model, as data, never code."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import tomli_w
from pydantic import Field, ValidationError

from quantize.errors import UsageError
from quantize.scheme import ActivationArgs, Data, Scheme, WeightArgs

SchemeName = Literal["W8A8", "W4A16", "W4A8", "W4A4"]
T = TypeVar("T")


class Recipe(Data):
    """Everything that determines an artifact, beside model and data.

    Attributes:
        scheme: the field's name; it fixes the bits of `weights` and `activations`.
        weights, activations: how they become integers.
        targets: linears to quantize: a module path, the end of one, or `re:` and a regular expression.
        ignore: linears to leave alone; None ignores `lm_head` where there is one.
        nsamples, seqlen: calibration windows, and tokens in each.
        seed: of every random choice.
        passes: outlier handlers in order, each `{name, parameters…}`.
        quantizer: how weights are rounded, `{name, parameters…}`.
    """

    scheme: SchemeName
    weights: WeightArgs
    activations: ActivationArgs | None = None
    targets: tuple[str, ...] = ("re:.*",)
    ignore: tuple[str, ...] | None = None
    nsamples: int = Field(128, ge=1)
    seqlen: int = Field(512, ge=2)
    seed: int = Field(0, ge=0)
    passes: tuple[dict[str, Any], ...] = ()
    quantizer: dict[str, Any] = Field(default_factory=lambda: {"name": "rtn"})

    @property
    def linear_scheme(self) -> Scheme:
        """What a quantized linear is made with."""
        return Scheme(weights=self.weights, activations=self.activations)

    def to_toml(self) -> str:
        """The recipe as TOML text."""
        return tomli_w.dumps(self.model_dump(exclude_none=True, mode="json"))


def load_recipe(scheme: str | None, path: Path | None, overrides: Mapping[str, Any]) -> Recipe:
    """The default recipe of a scheme, changed by a recipe file, changed by overrides.

    Args:
        scheme: scheme name; None takes the recipe file's.
        path: TOML file; its tables are merged into the default, its lists replace those of the default.
        overrides: values from the command line or the call, in the shape of a recipe.

    Raises:
        UsageError: unknown scheme, unreadable or invalid recipe.
    """
    given = read_toml(path) if path else {}
    name = scheme or given.get("scheme")
    if name not in get_args(SchemeName):
        raise UsageError(f"unknown scheme {name!r}; known are {', '.join(get_args(SchemeName))}")
    default = tomllib.loads(resources.files("quantize.recipes").joinpath(f"{name.lower()}.toml").read_text())
    settings = merge(merge(merge(default, given), overrides), {"scheme": name})
    recipe = validated(lambda: Recipe(**settings), f"recipe {path}" if path else "recipe")
    check_bits(recipe)
    return recipe


def read_toml(path: Path) -> dict[str, Any]:
    """A recipe file's settings."""
    try:
        return tomllib.loads(path.read_text())
    except OSError:
        raise UsageError(f"no such recipe: {path}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"recipe {path} is no TOML: {error}") from None


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
        where = ".".join(str(part) for part in first["loc"])
        raise UsageError(f"{what}: {where}: {first['msg'].lower()} (got {first['input']!r})") from None


def check_bits(recipe: Recipe) -> None:
    """The tables agree with the scheme's name."""
    weights, _, activations = recipe.scheme[1:].partition("A")
    found = 16 if recipe.activations is None else recipe.activations.num_bits
    if (recipe.weights.num_bits, found) != (int(weights), int(activations)):
        raise UsageError(
            f"recipe: {recipe.scheme} stands for {weights}-bit weights and {activations}-bit activations, "
            f"the tables say {recipe.weights.num_bits} and {found}"
        )
