"""quantize-model: makes transformers 4-bit with the least loss, and proves each step."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quantize.artifact.load import load as load
    from quantize.finetuning.finetune import finetune as finetune
    from quantize.pipeline.quantize import quantize_model as quantize_model

__all__ = ["finetune", "load", "quantize_model"]
_HOME = {
    "finetune": "quantize.finetuning.finetune",
    "load": "quantize.artifact.load",
    "quantize_model": "quantize.pipeline.quantize",
}


def __getattr__(name: str) -> Any:
    """Import torch and transformers, which take seconds, only when they are used: `--help` answers at once."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
