"""A causal language model is exported with keys and values as inputs and outputs."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from transformers import DynamicCache

from quantize.errors import UsageError
from quantize.export.comparison import copy_with_replaced_linears
from quantize.export.onnx.interface import BATCH, SEQUENCE, Feed, Interface, random_tokens
from quantize.graph.inputs import example_inputs
from quantize.nn.prefix_hooks import CACHES, HELD, detach

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PAST, TOTAL = f"past_{SEQUENCE}", f"total_{SEQUENCE}"
SHAPES = {"prefill": (1, 11, 0), "decode": (1, 1, 7), "batch of 2": (2, 4, 3)}  # samples, tokens, tokens in the cache


class Decoder(Interface):
    """A model that returns `logits` float32 [batch, sequence, vocabulary] and the cache with the new tokens.

    Inputs: `input_ids` int64 [batch, sequence]; `attention_mask` int64 [batch, past + sequence], in which zeros hide
        tokens;
    `position_ids` int64 [batch, sequence], if the model takes them; and for each layer N
    `past_key_values.N.key` and `.value`, float32 [batch, key/value heads, past, head_dim], with past = 0 at the start.
    Outputs: `logits`, and `present.N.key` and `present.N.value`, which are the past followed by the new tokens.

    A prefix of tokens is part of the model: its keys and values are constants in front of the past, which no input or
    output shows.

    Attributes:
        prefix: the number of tokens of the prefix.
        front_shape: the shape of the prefix's keys in the first layer, [1, key/value heads, prefix, head_dim].
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(
            copy_with_replaced_linears(model, lambda layer: layer)
        )  # a copy, so that its prefix can be removed
        taken = inspect.signature(model.forward).parameters
        self.cache_argument = next(name for name in CACHES if name in taken)
        held = self.cached(random_tokens(model, 1, 1, 0))
        self.prefix = detach(self.model)
        self.front = [f"front_{i}" for i in range(len(held))]
        for name, tensor in zip(self.front, held, strict=True):
            self.register_buffer(name, tensor[:, :, : self.prefix].clone())
        self.front_shape = tuple(getattr(self, self.front[0]).shape)
        pairs = [f"{n}.{part}" for n in range(len(held) // 2) for part in ("key", "value")]
        self.past = [f"past_key_values.{pair}" for pair in pairs]
        self.present = [f"present.{pair}" for pair in pairs]
        tokens, past, present = {0: BATCH, 1: SEQUENCE}, {0: BATCH, 2: PAST}, {0: BATCH, 2: TOTAL}
        self.inputs = {"input_ids": tokens, "attention_mask": {0: BATCH, 1: TOTAL}, "position_ids": tokens}
        self.inputs = {name: axes for name, axes in self.inputs.items() if name in taken}
        self.inputs |= dict.fromkeys(self.past, past)
        self.outputs = {"logits": tokens} | dict.fromkeys(self.present, present)

    def forward(self, feed: Feed) -> tuple[Tensor, ...]:
        """Return the logits, then the cache layer by layer, keys before values."""
        past = [self.behind_prefix(*names, feed) for names in zip(self.front, self.past, strict=True)]
        cache = DynamicCache(zip(past[::2], past[1::2], strict=True))
        given = {name: feed[name] for name in self.inputs if name not in self.past}
        if self.prefix:
            given = {name: HELD[name](value, self.prefix) if name in HELD else value for name, value in given.items()}
        logits = self.run(cache, **given).logits
        return (logits, *(t[:, :, self.prefix :] if self.prefix else t for t in tensors(cache)))

    def behind_prefix(self, front: str, name: str, feed: Feed) -> Tensor:
        """Return one layer's keys or values of the prefix and the past."""
        past: Tensor = feed[name]
        held: Tensor = getattr(self, front)
        return torch.cat([held.expand(past.shape[0], -1, -1, -1), past], dim=2) if self.prefix else past

    def run(self, cache: DynamicCache | None, **given: Tensor) -> Any:
        """Return the model's outputs with a cache, to which the call appends the new tokens."""
        return self.model(**given, **{self.cache_argument: cache}, use_cache=True)

    def cached(self, tokens: Tensor) -> list[Tensor]:
        """Return keys and values of tokens [batch, T] after an empty cache, with the prefix while it is attached."""
        cache = DynamicCache()
        with torch.no_grad():
            self.run(cache, input_ids=tokens)
        return tensors(cache)

    def feeds(self, seed: int) -> dict[str, Feed]:
        """Return a prompt, one token after a cache, and two samples, the first of which begins with padding."""
        return {name: self.feed(*shape, seed) for name, shape in SHAPES.items()}

    def feed(self, batch: int, length: int, past: int, seed: int) -> Feed:
        """Return random tokens after a cache of other random tokens."""
        return self.after(random_tokens(self.model, batch, past + length, seed), past)

    def feed_of(self, given: Mapping[str, Tensor]) -> Feed:
        """Return token ids [1, T] as a prompt."""
        return self.after(given["input_ids"], 0)

    def after(self, tokens: Tensor, past: int) -> Feed:
        """Return tokens [batch, past + T], the first of them in a cache; the first one of several samples is padded."""
        batch = len(tokens)
        mask = torch.ones_like(tokens)
        mask[0, 0] = int(batch == 1)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        values = {"input_ids": tokens[:, past:], "attention_mask": mask, "position_ids": positions[:, past:]}
        feed = {name: value.contiguous() for name, value in values.items() if name in self.inputs}
        # Without a prefix any values do, and without a past there are none.
        cache = self.cached(tokens) if past else [getattr(self, front).repeat(batch, 1, 1, 1) for front in self.front]
        held = [t[:, :, :past].contiguous() for t in cache]
        return feed | dict(zip(self.past, held, strict=True))


def tensors(cache: DynamicCache) -> list[Tensor]:
    """Return keys and values, layer by layer."""
    return [t for layer in cache.layers for t in (layer.keys, layer.values)]


def is_causal_lm(model: PreTrainedModel) -> bool:
    """Return whether a model scores the next token and keeps keys and values of the tokens before.

    Raises:
        UsageError: it keeps anything else of them.
    """
    takes_cache = set(CACHES) & set(inspect.signature(model.forward).parameters)
    if list(example_inputs(model)) != ["input_ids"] or not model.can_generate() or not takes_cache:
        return False
    with torch.no_grad():
        found = model(input_ids=random_tokens(model, 1, 1, 0), use_cache=True)
    cache = next((found[name] for name in CACHES if found.get(name) is not None), None)
    if cache is not None and not all(holds_heads(layer) for layer in cache.layers):
        raise UsageError(
            "the model keeps more of earlier tokens than keys and values, for which the ONNX file has no inputs; "
            "run the artifact with quantize.load"
        )
    return cache is not None and "logits" in found


def holds_heads(layer: Any) -> bool:
    """Return whether a layer of a cache consists of keys and values [batch, heads, tokens, head_dim] and no more."""
    # A single number, such as the length of a sliding window, is not of any token.
    held = {
        name: value
        for name, value in vars(layer).items()
        if any(isinstance(t, Tensor) and t.dim() for t in tree_leaves(value))
    }
    return {"keys", "values"} == held.keys() and all(isinstance(t, Tensor) and t.dim() == 4 for t in held.values())
