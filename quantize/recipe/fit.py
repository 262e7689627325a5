"""Whether a recipe can be followed, and whether it fits a model, as far as names and files tell without torch."""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any

from quantize.errors import UsageError
from quantize.recipe.fields import RecipeFields
from quantize.recipe.patterns import TABLE, require_possible
from quantize.scheme.registry import registered, require_name


def check_methods(recipe: RecipeFields) -> None:
    """Check that there are the passes, the quantizer and the number formats that a recipe names.

    Raises:
        UsageError: there is none of a name.
    """
    for handler in recipe.passes:
        require_name("pass", str(handler.get("name")), registered("quantize.passes"))
    require_name("quantizer", str(recipe.quantizer.get("name")), registered("quantize.quantizers"))
    for table in (recipe.weights, recipe.activations):
        if table is not None:
            require_name("number format", table.format, registered("quantize.formats"))


def check_length(config: Mapping[str, Any], recipe: RecipeFields) -> None:
    """Check that the windows fit the model's positions.

    Raises:
        UsageError: they do not.
    """
    longest, p = config.get("max_position_embeddings"), len(recipe.prefix.tokens if recipe.prefix else ())
    if isinstance(longest, int) and recipe.seqlen + p > longest:
        more = f" with the prefix of {p}" if p else ""
        raise UsageError(f"--seqlen {recipe.seqlen}{more} is more than the {longest} positions of the model")


def check_patterns(recipe: RecipeFields, parts: Set[str], words: Set[str]) -> None:
    """Check that no pattern of a recipe names what no module of the model is called; the sets as in `require_possible`.

    Raises:
        UsageError: one does, or is no expression.
    """
    given = {"targets": recipe.targets, "ignore": (*(recipe.ignore or ()), *recipe.ignore_also)}
    for kind, patterns in (given | {"layers": tuple(entry.match for entry in recipe.layers)}).items():
        for pattern in patterns:
            require_possible(kind, pattern, parts, words)
    for pattern in recipe.tables or ():
        require_possible("tables", pattern, parts, words, TABLE)
