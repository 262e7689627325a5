"""A quantized KV cache in a transformers model: each setting is an attention function of its own name."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from quantize.errors import QuantizeError
from quantize.nn.kv_cache import Masked, read_heads
from quantize.nn.recent_window import with_recent_rows
from quantize.scheme.scheme import KVCacheArgs

FLOAT = "sdpa"  # the implementation that becomes `scaled_dot_product_attention` in a graph
PREFIX = "quantized_kv_cache_"
RECENT = "recent_rows"  # of keys that are rounded already: the last keys and values in floating point, or None


def attend_with_quantized_cache(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    kv_cache: KVCacheArgs,
    **options: Any,
) -> tuple[Tensor, None]:
    """Compute float attention on keys and values as a quantized cache holds them; transformers calls this function.

    A cache in floating point is rounded at each read; a packed one (`packed_cache.py`) returns what is rounded already,
    and the rows that are recent for some query.

    Args:
        module: the attention module.
        query: [batch, heads, tokens, head_dim].
        key, value: [batch, key/value heads, cached tokens, head_dim].
        attention_mask: as for float attention.
        kv_cache: how keys and values are rounded.
        options: as for float attention.
    """
    causal = options.get("is_causal")
    is_causal = query.shape[-2] > 1 and bool(getattr(module, "is_causal", True) if causal is None else causal)
    *operands, mask = held_heads(query, key, value, attention_mask, is_causal, kv_cache)
    added = operands[1].shape[-2] - key.shape[-2]
    if added and (bias := options.get("position_bias")) is not None:
        options["position_bias"] = torch.cat([bias, bias[..., -added:]], dim=-1)
    return ALL_ATTENTION_FUNCTIONS[FLOAT](module, *operands, mask, **options)  # type: ignore[no-any-return]


def held_heads(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool, args: KVCacheArgs
) -> Masked:
    """Return attention's operands and mask for what a cache in floating point or a packed one returned."""
    if not hasattr(key, RECENT):
        return read_heads(query, key, value, mask, is_causal, args)
    if (recent := getattr(key, RECENT)) is None:
        return query, key, value, mask
    return with_recent_rows(query, (key, value), recent, mask, is_causal, args.residual_length)


def register(args: KVCacheArgs) -> str:
    """Register attention with these settings in transformers and return its name, which says all of them."""
    name = PREFIX + "_".join(f"{key}={value}" for key, value in args.model_dump().items())
    AttentionInterface.register(name, functools.partial(attend_with_quantized_cache, kv_cache=args))
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[FLOAT])
    return name


def set_kv_cache(model: nn.Module, args: KVCacheArgs | None) -> None:
    """Let every attention of a model round keys and values, in place; None lets none.

    The model's config carries the name of the attention function, so copies of the model keep the setting and no two
    models share one.

    Raises:
        QuantizeError: no attention of the model can round keys and values.
    """
    chosen = [config for config in configs(model) if config._attn_implementation == FLOAT or is_quantized(config)]
    if args is not None and not chosen:
        raise QuantizeError(f"the artifact quantizes the KV cache, but no attention of the model is {FLOAT!r}")
    name = FLOAT if args is None else register(args)
    for config in chosen:
        config._attn_implementation = {"": name}


def kv_cache_of(config: PreTrainedConfig) -> KVCacheArgs | None:
    """Return how attention of a config rounds keys and values; None if it does not."""
    function = ALL_ATTENTION_FUNCTIONS[str(config._attn_implementation)] if is_quantized(config) else None
    return None if function is None else function.keywords["kv_cache"]


def has_kv_cache(model: nn.Module) -> bool:
    """Return whether some attention of a model rounds keys and values."""
    return any(is_quantized(config) for config in configs(model))


def is_quantized(config: PreTrainedConfig) -> bool:
    """Return whether a config names attention with a quantized cache."""
    return str(config._attn_implementation).startswith(PREFIX)


def configs(model: nn.Module) -> list[PreTrainedConfig]:
    """Return the configs of a model and its parts, each once."""
    found = (getattr(module, "config", None) for module in model.modules())
    return list({id(config): config for config in found if isinstance(config, PreTrainedConfig)}.values())
