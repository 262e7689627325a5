"""An ordinary checkpoint cannot hold some of what artifacts do."""

from __future__ import annotations

from collections.abc import Iterator

from quantize.export.base import Obstacle
from quantize.export.outline import Outline
from quantize.export.safetensors_float.dequantize import is_transposed

INSTEAD = "or measure the artifact itself with `quantize-model eval`"


def obstacles(outline: Outline) -> Iterator[Obstacle]:
    """Yield each reason once; transforms in front of a linear are no obstacle, because weight and bias absorb them."""
    if outline.settings.get("prefix"):
        reason = "a prefix of tokens stands in front of every sequence, for which an ordinary checkpoint has no place"
        yield Obstacle(reason, f"quantize with no `prefix`, {INSTEAD}")
    if outline.settings.get("kv_cache"):
        reason = "keys and values are quantized, for which an ordinary checkpoint has no place"
        yield Obstacle(reason, f"quantize with no table `kv_cache`, {INSTEAD}")
    stacks = set(outline.experts)
    for path, entry in ((x, entry) for x, entry in outline.settings["modules"].items() if x not in stacks):
        if is_transposed(module := outline.skeleton.get_submodule(path), entry["columns"]) is None:
            reason = f"{path} is a {type(module).__name__}, of which it is not known how it holds its weight"
            yield Obstacle(reason, f"quantize with --ignore {path}")
