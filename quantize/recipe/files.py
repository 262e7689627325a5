"""A recipe's file is read as plain data, without torch; what stands in it is checked in `recipe.py`."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

from quantize.errors import UsageError, reason
from quantize.recipe.shipped import require_recipe, shipped
from quantize.recipe.yaml_files import parse_yaml

LARGEST, DEEPEST = (
    1 << 18,
    16,
)  # bytes of a recipe, and tables and lists in one another; a real one has a hundredth of it
NOT_STRUCTURE = re.compile(
    r'''"""(?:\\.|[^\\])*?"""|\'{3}.*?\'{3}|"(?:\\.|[^"\\\n])*"|'[^'\n]*'|#[^\n]*''', re.DOTALL
)  # strings and comments


def read_recipe(path: Path) -> dict[str, Any]:
    """Read the settings of a recipe file, or of the shipped recipe of this name.

    Raises:
        UsageError: there is no such file, or it cannot be read.
    """
    require_recipe(path)
    try:
        text = read_text(path) if path.suffix or path.exists() else shipped(str(path))
        if path.suffix in (".yaml", ".yml"):
            return parse_yaml(text)
        if (found := depth(text)) > DEEPEST:
            raise ValueError(f"it is nested {found} deep; a recipe takes {DEEPEST} at most")
        return tomllib.loads(text)
    except OSError as error:
        raise UsageError(f"recipe {path} cannot be read: {error}") from None
    except (ValueError, RecursionError) as error:  # TOMLDecodeError, no UTF-8, or a number with thousands of digits
        kind = "YAML" if path.suffix in (".yaml", ".yml") else "TOML"
        raise UsageError(f"recipe {path} is no {kind}: {reason(error)}") from None


def read_text(path: Path) -> str:
    """Read the text of a recipe file.

    Raises:
        OSError, ValueError: it is no regular file, too large, or not UTF-8.
    """
    if not path.is_file():
        raise FileNotFoundError(path)
    with path.open("rb") as file:
        content = file.read(LARGEST + 1)
    if len(content) > LARGEST:
        raise ValueError(f"it has more than {LARGEST} bytes; a recipe takes {LARGEST} at most")
    return content.decode()


def depth(text: str) -> int:
    """Return how many tables and lists of a TOML text lie in one another at most, or more, without parsing it.

    The parser takes a time that is quadratic in the depth of a key, and calls itself for each list.
    """
    brackets = deepest = 0
    for line in NOT_STRUCTURE.sub("0", text).splitlines():
        for part in re.split(r"([\[\]{}=,])", line):
            brackets = max(0, brackets + (part in ("[", "{")) - (part in ("]", "}")))
            deepest = max(deepest, brackets + part.count("."))
    return deepest
