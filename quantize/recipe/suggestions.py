"""A key that a recipe does not have where it stands may have its place elsewhere, or be misspelt."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from pydantic import BaseModel

from quantize.scheme.scheme import ActivationArgs, KVCacheArgs, TuneArgs, WeightArgs

TABLES: dict[str, type[BaseModel]] = {
    "weights": WeightArgs,
    "activations": ActivationArgs,
    "kv_cache": KVCacheArgs,
    "tune": TuneArgs,
}


def suggestion(where: Sequence[str], top: Sequence[str]) -> str:
    """Return a question that names what was likely meant by an unknown key, or ''.

    Args:
        where: the tables that the key stands in, and the key itself.
        top: the keys that stand in no table.
    """
    *tables, key = where
    here = list(top) if not tables else list(TABLES[tables[0]].model_fields) if tables[0] in TABLES else []
    owners = [f"[{table}] {key}" for table, model in TABLES.items() if key in model.model_fields]
    owners += [f"{key} in no table"] if key in top else []
    close = difflib.get_close_matches(key, here, 1)
    meant = owners or close
    return f"; did you mean {' or '.join(f'`{name}`' for name in meant)}?" if meant else ""
