"""The quantization settings in an artifact's config say what its linears were made into."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quantize.nn.quantized_linear import QuantizedLinear
from quantize.recipe.recipe import Recipe
from quantize.scheme.scheme import Scheme

METHOD = "quantize-model"


def linear_settings(module: QuantizedLinear, default: Scheme) -> dict[str, object]:
    """Return a quantized linear's entry in the artifact's settings; `default` is the scheme named for all linears."""
    entry: dict[str, object] = {"columns": module.in_features}
    if len(module.transform):
        entry["online"] = [transform.settings() for transform in module.online]
    if module.scheme != default:
        entry["scheme"] = module.scheme.model_dump()
    return entry


def quantization_settings(
    recipe: Recipe, default: Scheme, modules: Mapping[str, Mapping[str, object]]
) -> dict[str, Any]:
    """Return the artifact's quantization settings, with the entries of `linear_settings` by path."""
    settings: dict[str, Any] = {"quant_method": METHOD, "scheme": default.model_dump(), "modules": modules}
    settings |= {"tables": [path for path in recipe.tables or () if path not in modules]}
    settings |= {"prefix": list(recipe.prefix_tokens)} if recipe.prefix else {}
    return settings | ({"kv_cache": recipe.kv_cache.model_dump()} if recipe.kv_cache else {})


def linear_scheme(settings: Mapping[str, Any], path: str) -> Scheme:
    """Return the scheme of a linear from an artifact's quantization settings."""
    return Scheme(**settings["modules"][path].get("scheme") or settings["scheme"])
