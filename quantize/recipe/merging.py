"""A recipe's file is merged into the default of its scheme; its keys are checked without torch."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quantize.errors import UsageError
from quantize.recipe.fields import RecipeFields
from quantize.recipe.files import read_recipe
from quantize.recipe.shipped import shipped
from quantize.recipe.targets import recipe_for
from quantize.recipe.validation import validated
from quantize.scheme.names import SCHEME_NAMES, scheme_name


def check_fields(scheme: str | None, file: Path | None, target: str | None) -> RecipeFields:
    """Return a run's recipe, of which only the scheme, the keys, and that the target executes the scheme are checked.

    Raises:
        UsageError: one of them is wrong; arguments are those of `load_recipe`, which checks everything else.
    """
    given = {} if file is None else read_recipe(file)
    name = chosen_scheme(scheme, given)
    merged = merge(default_of(name, target), given) | {"scheme": name}
    return validated(lambda: RecipeFields(**merged), f"recipe {file}")


def chosen_scheme(scheme: str | None, given: Mapping[str, Any]) -> str:
    """Return the name of the scheme of a run, which is the recipe's where no other is given.

    Raises:
        UsageError: there is none, or no scheme has the name.
    """
    name = scheme or given.get("scheme")
    if name is None:
        raise UsageError(f"give --scheme, one of {', '.join(SCHEME_NAMES)}, or a recipe with one")
    name = scheme_name(str(name))
    if name not in SCHEME_NAMES:
        raise UsageError(f"unknown scheme {name!r}; known are {', '.join(SCHEME_NAMES)}")
    return name


def default_of(scheme: str, target: str | None, of_format: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the default recipe of a scheme.

    Args:
        scheme: its name.
        target: the runtime whose recipe is merged into the scheme's; None for none.
        of_format: what a number format says, which is merged in between.

    Raises:
        UsageError: there is no such target, or it cannot execute the scheme.
    """
    default = merge(tomllib.loads(shipped(scheme.lower())), of_format or {})
    own = recipe_for(target, scheme)
    return merge(default, tomllib.loads(shipped(own))) if own else default


def merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Merge `changes` into `base` key by key; a table that names its method replaces the whole table."""
    result = dict(base)
    for key, value in changes.items():
        both = isinstance(value, Mapping) and isinstance(base.get(key), Mapping) and "name" not in value
        result[key] = merge(base[key], value) if both else value
    return result
