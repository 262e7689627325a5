"""Recipes may be written in YAML, as those of llm-compressor are."""

from __future__ import annotations

from typing import Any

import yaml

LARGEST, DEEPEST = 1 << 16, 16  # characters, and tables within tables


class RecipeLoader(yaml.SafeLoader):  # type: ignore[misc]
    """A loader of plain data, in which nothing is repeated by an alias and little is nested."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Compose one node.

        Raises:
            ValueError: it is an alias, or lies too deep.
        """
        if self.check_event(yaml.AliasEvent):
            raise ValueError("it has an alias (*); write the value out")
        self.depth += 1
        if self.depth > DEEPEST:
            raise ValueError("it is nested too deeply")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


def parse_yaml(text: str) -> dict[str, Any]:
    """Parse the settings of a recipe.

    Raises:
        ValueError: the text is no YAML, or more than a recipe needs.
    """
    if len(text) > LARGEST:
        raise ValueError(f"it has {len(text)} characters, more than a recipe ever has")
    try:
        found = yaml.load(text, RecipeLoader)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None
    if found is not None and not isinstance(found, dict):
        raise ValueError("it holds no keys with values")
    return found or {}
