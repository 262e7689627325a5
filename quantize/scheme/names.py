"""The names of schemes, engines and artifacts; nothing slow is imported here, so that the command answers at once."""

from __future__ import annotations

from typing import Literal, get_args

SchemeName = Literal["W8A8", "W8A16", "W4A16", "W3A16", "W4A8", "W4A4", "W6A6", "MXFP4", "NVFP4"]
SCHEME_NAMES: tuple[str, ...] = get_args(SchemeName)
COMMON_NAMES = {"INT4": "W4A16", "INT8": "W8A8"}  # what other tools call these schemes
Engine = Literal["fake_quant", "reference"]
METHOD = "quantize-model"  # the method that the config of an artifact names
ENGINES: tuple[Engine, ...] = get_args(Engine)  # how a loaded model runs on a CPU (`nn/cpu_engine.py`)


def scheme_name(name: str) -> str:
    """Return a scheme's name as this package writes it, from any case or a common name; others stay as they are."""
    return COMMON_NAMES.get(name.upper(), name.upper() if name.upper() in SCHEME_NAMES else name)
