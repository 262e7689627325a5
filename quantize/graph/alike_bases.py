"""Bases that are alike in every layer are told once, with their number."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any


def alike_bases(bases: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return a record for bases alike in every layer, in the order in which the first of them comes.

    Args:
        bases: what `Basis.as_dict` returns, for each basis.

    Returns:
        For each kind `count`, `channels` (`4 × 64` for four heads), what is `allowed`, the names that it is
        `written_by` and `read_by`, without the layers' numbers, and `why_no_more` is allowed.
    """
    names = ("channels", "allowed", "written_by", "read_by", "why_no_more")
    return [
        {"count": count, **dict(zip(names, row, strict=True))} for row, count in Counter(map(as_row, bases)).items()
    ]


def as_row(basis: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return a basis with the layers' numbers taken out of all names."""
    heads = basis["heads"]
    dim = f"{basis['dim']}" if heads in (1, basis["dim"]) else f"{heads} × {basis['dim'] // heads}"
    pairs = [f"↔ {name}" for name in basis["paired"]]
    gains = [f"only once `{name}` is folded" for name in basis["after_folding"]]
    lists = (basis["writers"], [*basis["readers"], *pairs], [*basis["pins"], *gains])
    return dim, basis["allowed"].replace("_", " "), *(tuple(dict.fromkeys(map(anonymous, names))) for names in lists)


def anonymous(text: str) -> str:
    """Return `layers.{i}.mlp` for `layers.7.mlp.weight`."""
    return re.sub(r"\.\d+\.", ".{i}.", text).removesuffix(".weight")
