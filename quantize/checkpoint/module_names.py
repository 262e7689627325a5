"""What the modules of a model may be called is told by its files and by the text of its class, without importing it."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from quantize.checkpoint.paths import INDEX, LARGEST_HEADER, LARGEST_JSON, LONGEST_NAME, glance

WORD = re.compile(r"\w+")
OTHERS = ("modular_", "convert_", "tokenization_")  # what classes are generated from, and files without modules
ELSEWHERE = re.compile(r"^from \.\.(?!auto)\w", re.MULTILINE)  # an import from another model's folder


def possible_parts(directory: Path) -> tuple[set[str], set[str]]:
    """Return what may stand between the dots of a module's path: parts of tensors' names, and words of the class.

    A module has the name that tensors have in files, or one that its class gives it. Where this cannot be told, as of
    code of a model's own, both sets are empty.
    """
    config, names = glance(directory / "config.json", LARGEST_JSON), tensor_names(directory)
    texts = [text_of(kind) for kind in kinds(config)]
    if not names or not texts or not all(texts) or "auto_map" in config:
        return set(), set()
    if not all(name.isprintable() and len(name) <= LONGEST_NAME for name in names):
        return set(), set()
    return {part for name in names for part in name.split(".")}, set(WORD.findall(" ".join(texts)))


def tensor_names(directory: Path) -> list[str]:
    """Return the names of tensors in an index of shards, or in headers; what is not sound there is found later."""
    index = glance(directory / INDEX, LARGEST_JSON).get("weight_map")
    if isinstance(index, dict):
        return list(index)
    headers = (glance(path, LARGEST_HEADER, counted=True) for path in sorted(directory.glob("*.safetensors")))
    return [name for header in headers for name in header if name != "__metadata__"]


def kinds(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield each `model_type` of a config and of the configs in it."""
    if isinstance(kind := config.get("model_type"), str):
        yield kind
    for value in config.values():
        if isinstance(value, dict):
            yield from kinds(value)


def text_of(kind: str) -> str:
    """Return the text of a model's class in transformers, or '' if it is not found or takes modules from elsewhere.

    The class lies in the folder with the longest name that its `model_type` begins with.
    """
    found = importlib.util.find_spec("transformers")
    if found is None or not found.submodule_search_locations or not re.fullmatch(r"[a-z][\w-]*", kind):
        return ""
    models, words = Path(found.submodule_search_locations[0]) / "models", kind.replace("-", "_").split("_")
    tried = (models / "_".join(words[:end]) for end in range(len(words), 0, -1))
    folder = next((path for path in tried if path.is_dir()), models)
    files = [path for path in sorted(folder.glob("*.py")) if not path.name.startswith(OTHERS)]
    if not any(path.name.startswith("modeling_") for path in files):
        return ""
    text = "\n".join(path.read_text(encoding="utf-8") for path in files)
    return "" if ELSEWHERE.search(text) else text
