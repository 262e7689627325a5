"""A config may tie parameters that its files hold apart: what is stored counts, as in transformers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from quantize.checkpoint.key_mapping import StoredTensor
from quantize.checkpoint.safetensors_reader import read_header, read_rows

ROWS = 4096  # of a table that are compared at once


def told_apart(
    ties: Mapping[str, tuple[str, ...]],
    sources: Mapping[str, StoredTensor],
    files: Mapping[str, Path],
    require: Callable[[Path], None] | None = None,
) -> list[tuple[str, str]]:
    """Return the pairs of tied parameters that the files hold with different values.

    Args:
        ties: parameter → all names of the same parameter.
        sources: parameter → where it lies.
        files: name in a file → the file.
        require: fetches a file before it is read; None for files that are here.
    """
    found = []
    for names in sorted(set(ties.values())):
        first, *others = [name for name in names if name in sources and sources[name].converter is None] or [""]
        found += [(first, other) for other in others if not equal(sources[first], sources[other], files, require)]
    return found


def equal(a: StoredTensor, b: StoredTensor, files: Mapping[str, Path], require: Callable[[Path], None] | None) -> bool:
    """Return whether two tensors in files are equal, some rows at a time."""
    one, two = a.names[0], b.names[0]
    for name in (one, two) if require else ():
        require(files[name])  # type: ignore[misc]
    x, y = read_header(files[one]).entries[one], read_header(files[two]).entries[two]
    if x.shape != y.shape:
        return False
    starts = range(0, x.shape[0], ROWS) if x.shape else (0,)
    return all(
        torch.equal(read_rows(files[one], one, start, ROWS).float(), read_rows(files[two], two, start, ROWS).float())
        for start in starts
    )


def without_ties(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config that ties no tables, in none of its parts."""
    parts = {k: without_ties(v) for k, v in config.items() if isinstance(v, dict) and "tie_word_embeddings" in v}
    return {**config, **parts, "tie_word_embeddings": False}


def kept_apart(pair: tuple[str, str]) -> str:
    """Say in a sentence what became of two parameters."""
    both = " and ".join(pair)
    return f"warning: the config ties {both}, but the files hold both and they differ: each is taken as it is stored"
