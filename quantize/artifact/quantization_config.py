"""The quantization settings of an artifact's config: what its linears were made into."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quantize.nn.quantized_linear import QuantizedLinear
from quantize.recipe.recipe import Recipe
from quantize.recipe.scheme import ActivationArgs, Scheme

METHOD = "quantize-model"


def linear_settings(module: QuantizedLinear, default: ActivationArgs | None) -> dict[str, object]:
    """A quantized linear's entry in the artifact's quantization settings."""
    entry: dict[str, object] = {"columns": module.in_features}
    if len(module.transform):
        entry["online"] = [transform.settings() for transform in module.online]
    if module.scheme.activations != default and module.scheme.activations is not None:
        entry["activations"] = module.scheme.activations.model_dump()
    return entry


def quantization_settings(recipe: Recipe, modules: Mapping[str, Mapping[str, object]]) -> dict[str, Any]:
    """The artifact's quantization settings, with what `linear_settings` says of each linear, by path."""
    scheme = recipe.linear_scheme.model_dump()
    settings: dict[str, Any] = {"quant_method": METHOD, "scheme": scheme, "modules": modules}
    settings |= {"prefix": list(recipe.prefix_tokens)} if recipe.prefix else {}
    return settings | ({"kv_cache": recipe.kv_cache.model_dump()} if recipe.kv_cache else {})


def linear_scheme(settings: Mapping[str, Any], path: str) -> Scheme:
    """What a linear is quantized to, from an artifact's quantization settings."""
    scheme, entry = Scheme(**settings["scheme"]), settings["modules"][path]
    if "activations" in entry:
        return Scheme(weights=scheme.weights, activations=ActivationArgs(**entry["activations"]))
    return scheme
