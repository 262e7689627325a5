"""A recipe says what to do to a model. It is data and never code."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import tomli_w
from pydantic import AfterValidator

from quantize.errors import UsageError
from quantize.formats import FORMATS, check_args, check_scheme, get_format
from quantize.recipe.fields import RecipeFields
from quantize.recipe.files import read_recipe
from quantize.recipe.merging import chosen_scheme, default_of, merge
from quantize.recipe.patterns import expand_patterns
from quantize.recipe.shipped import shipped
from quantize.recipe.validation import validated
from quantize.scheme.scheme import SCHEME_NAMES, ActivationArgs, Scheme, WeightArgs


class Recipe(RecipeFields):
    """Everything that determines an artifact apart from the model and the data; `RecipeFields` lists it."""

    weights: Annotated[WeightArgs, AfterValidator(check_args)]
    activations: Annotated[ActivationArgs, AfterValidator(check_args)] | None = None

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
    **settings: float | None,
) -> Recipe:
    """Load the default recipe of a scheme and change it by a recipe and then by single settings.

    Args:
        scheme: the scheme's name; None takes the recipe's.
        changes: a TOML file, the name of a shipped recipe, or the content of a recipe. Its tables are merged into the
            default; its lists replace those of the default.
        ignore: further linears to leave in floating point: names, globs, lists separated by commas, or expressions.
        group_size: the number of columns that share a scale; None leaves the recipe's.
        target: the runtime whose recipe takes the place of the scheme's default; None takes the default.
        settings: `nsamples`, `seqlen`, `seed`, `average_bits` and `requantize`; None leaves the recipe's.

    Raises:
        UsageError: the scheme is unknown, or the recipe cannot be read or is not valid.
    """
    given = read_recipe(changes) if isinstance(changes, Path) else dict(changes or {})
    name = chosen_scheme(scheme, given)
    default = default_of(name, target, format_defaults(given))
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
