"""quantize-model: makes transformers 4-bit with the least loss, and proves each step."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from quantize.artifact.registration import register_when_imported

if TYPE_CHECKING:
    from quantize.artifact.load import load as load
    from quantize.eval.report import evaluate as evaluate
    from quantize.export.directory import export_artifact as export_artifact
    from quantize.export.model_free.quantize import quantize_model_free as quantize_model_free
    from quantize.finetuning.finetune import finetune as finetune
    from quantize.graph.inspect import inspect as inspect
    from quantize.nn.packed_cache import packed_cache as packed_cache
    from quantize.pipeline.pruned_model import prune_model as prune_model
    from quantize.pipeline.quantize import Artifact as Artifact
    from quantize.pipeline.quantize import quantize_model as quantize_model
    from quantize.recipe.recipe import Recipe as Recipe

    __version__: str

HOMES = {
    "Artifact": "quantize.pipeline.quantize",
    "Recipe": "quantize.recipe.recipe",
    "evaluate": "quantize.eval.report",
    "export_artifact": "quantize.export.directory",
    "finetune": "quantize.finetuning.finetune",
    "inspect": "quantize.graph.inspect",
    "load": "quantize.artifact.load",
    "packed_cache": "quantize.nn.packed_cache",
    "prune_model": "quantize.pipeline.pruned_model",
    "quantize_model": "quantize.pipeline.quantize",
    "quantize_model_free": "quantize.export.model_free.quantize",
}
__all__ = [
    "Artifact",
    "Recipe",
    "evaluate",
    "export_artifact",
    "finetune",
    "inspect",
    "load",
    "packed_cache",
    "prune_model",
    "quantize_model",
    "quantize_model_free",
]


def __getattr__(name: str) -> Any:
    """Import torch and transformers, which take seconds, only when they are used: `--help` answers at once."""
    if name == "__version__":
        from importlib.metadata import version

        return version("quantize-model")
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(HOMES[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


register_when_imported()
