"""What pydantic finds wrong with a file becomes one sentence."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from pydantic import ValidationError

from quantize.errors import LONGEST, UsageError, shown
from quantize.recipe.fields import RecipeFields
from quantize.recipe.suggestions import suggestion

T = TypeVar("T")


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
            meant = suggestion(where.split("."), list(RecipeFields.model_fields)) if error.title == "Recipe" else ""
            raise UsageError(f"{what}: {where}: there is no such key here{meant or '; leave it out'}") from None
        raise UsageError(
            f"{what}: {where}: {first['msg'][:1].lower()}{first['msg'][1:]} (got {shown(first['input'])})"
        ) from None
