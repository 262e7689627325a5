"""The quantization settings in an artifact's config say what its linears were made into."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quantize.nn.quantized_experts import QuantizedExperts
from quantize.nn.quantized_weight import QuantizedWeight
from quantize.recipe.recipe import Recipe
from quantize.scheme.names import METHOD
from quantize.scheme.scheme import Scheme


def linear_settings(module: QuantizedWeight, default: Scheme) -> dict[str, object]:
    """Return a quantized linear's entry in the artifact's settings; `default` is the scheme named for all linears.

    That of experts says how many there are, and whether their parameter is [experts, K, N].
    """
    entry: dict[str, object] = {"columns": module.in_features}
    if isinstance(module, QuantizedExperts):
        entry |= {"experts": module.count, "transposed": module.transposed}
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
