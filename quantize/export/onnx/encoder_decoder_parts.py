"""An encoder-decoder is cut in two halves, the first of which does not depend on generated tokens."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache

from quantize.export.onnx.decoder import PAST, SHAPES, TOTAL, holds_heads, tensors
from quantize.export.onnx.encoder import SinglePassModel
from quantize.export.onnx.interface import BATCH, SEQUENCE, Axes, Feed, Interface
from quantize.export.onnx.lowering import lower_for_prefill
from quantize.graph.inputs import example_inputs
from quantize.nn.prefix_hooks import CACHES

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOKENS, STATES, MASK = "decoder_input_ids", "encoder_hidden_states", "encoder_attention_mask"


class EncoderWithCrossKV(Interface):
    """A model that returns the encoder's states and cross-attention's keys and values, which are computed once.

    It is the whole model, of which the graph keeps what its outputs need: the encoder, and those linears of the decoder
    that compute keys and values from the encoder's states. Tracing needs tokens for the decoder, but the file has no
    such input.

    Inputs: those of `SinglePassModel`, without `decoder_input_ids`.
    Outputs: `encoder_hidden_states` float32 [batch, positions, channels], and for each layer N
    `present.N.encoder.key` and `.value`, float32 [batch, heads, positions, head_dim].
    """

    lower = staticmethod(lower_for_prefill)
    unread = (TOKENS,)

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        self.random = SinglePassModel(model)
        self.inputs = dict(self.random.inputs)
        self.free = {1: f"encoder_{SEQUENCE}"} if MASK.removeprefix("encoder_") in self.inputs else {}
        _, cache = self.results(self.random.feeds(0)["two"])
        layers = range(len(cache.cross_attention_cache.layers))
        self.pairs = [f"{n}.{{}}.{part}" for n in layers for part in ("key", "value")]
        keys: Axes = {0: BATCH} | {axis + 1: name for axis, name in self.free.items()}
        self.outputs = {STATES: {0: BATCH} | self.free} | dict.fromkeys(self.named("present", "encoder"), keys)

    def named(self, stem: str, half: str) -> list[str]:
        """Return the names of the keys and values among inputs or outputs, which are those of optimum."""
        return [f"{stem}.{pair.format(half)}" for pair in self.pairs]

    def results(self, feed: Feed) -> tuple[Tensor, EncoderDecoderCache]:
        """Return the encoder's states, and the cache after a first call of the whole model."""
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        given = {name: feed[name] for name in self.random.inputs}
        found = self.model(**given, **{cache_argument(self.model): cache}, use_cache=True)
        return found.encoder_last_hidden_state, cache

    def forward(self, feed: Feed) -> tuple[Tensor, ...]:
        """Return the encoder's states, then keys and values layer by layer.

        The decoder computes keys and values for as many samples as its tokens have, so its tokens are made here with as
        many samples as the encoder's input: if the number came from an input of tokens, the file would need that input.
        """
        samples = feed[next(iter(self.inputs))].shape[0]
        states, cache = self.results(feed | {TOKENS: feed[TOKENS][:1].expand(samples, -1)})
        return (states, *tensors(cache.cross_attention_cache))

    def feeds(self, seed: int) -> dict[str, Feed]:
        """Return one, two and three samples."""
        return self.random.feeds(seed)


class DecoderWithPast(Interface):
    """A model that returns `logits` float32 [batch, sequence, vocabulary] and the decoder's cache with the new tokens.

    Inputs: `input_ids` int64 [batch, sequence]; `encoder_attention_mask` and `encoder_hidden_states`, if the graph
        reads
    them; and for each layer N `past_key_values.N.decoder.key` and `.value`, float32 [batch, heads, past, head_dim],
    with past = 0 at the start, and `past_key_values.N.encoder.key` and `.value`, which the other half returns.
    Outputs: `logits`, and `present.N.decoder.key` and `.value`, which are the past followed by the new tokens.
    """

    optional = (MASK, STATES)

    def __init__(self, encoder: EncoderWithCrossKV) -> None:
        super().__init__(encoder.model)
        self.encoder = encoder
        self.past, self.crossed = (encoder.named("past_key_values", half) for half in ("decoder", "encoder"))
        self.present, states, *keys = encoder.named("present", "decoder"), *encoder.outputs.values()
        mask = {MASK: {0: BATCH, **encoder.free}} if encoder.free else {}
        self.inputs = {"input_ids": {0: BATCH, 1: SEQUENCE}} | mask | {STATES: states}
        self.inputs |= {name: {0: BATCH, 2: PAST} for name in self.past} | dict.fromkeys(self.crossed, keys[0])
        self.outputs = {"logits": self.inputs["input_ids"]} | {key: {0: BATCH, 2: TOTAL} for key in self.present}

    def forward(self, feed: Feed) -> tuple[Tensor, ...]:
        """Return the logits, then the decoder's cache layer by layer, keys before values."""
        own, crossed = (paired([feed[name] for name in names]) for names in (self.past, self.crossed))
        cache = EncoderDecoderCache(own, crossed)
        cache.is_updated = dict.fromkeys(range(len(crossed.layers)), True)
        given: dict[str, Any] = {"attention_mask": feed[MASK]} if MASK in feed else {}
        given |= {TOKENS: feed["input_ids"], "encoder_outputs": (feed[STATES],), cache_argument(self.model): cache}
        logits = self.model(**given, use_cache=True).logits
        return (logits, *tensors(own))

    def behind(self, feed: Feed, encoded: tuple[Tensor, ...]) -> Feed:
        """Return this half's inputs from both halves' inputs and from the outputs of the other half."""
        known = {"input_ids": feed[TOKENS]} | {STATES: encoded[0]} | {name: feed[name] for name in self.past}
        known |= dict(zip(self.crossed, encoded[1:], strict=True))
        known |= {MASK: feed["attention_mask"]} if self.encoder.free else {}
        return {name: known[name] for name in self.inputs}

    def of_both(self, seed: int) -> dict[str, Feed]:
        """Return a prompt, one token after a cache, and two samples, as inputs of both halves."""
        return {name: self.feed(*shape, seed) for name, shape in SHAPES.items()}

    def feed(self, batch: int, length: int, past: int, seed: int) -> Feed:
        """Return random inputs of one shape, with a past that the model computed."""
        return self.after(self.encoder.random.feed(batch, past + length, seed), past)

    def whole(self, given: Mapping[str, Tensor]) -> Feed:
        """Return a sample as inputs of both halves, with no token in the cache and nothing hidden."""
        beside = {"attention_mask": torch.ones_like, "token_type_ids": torch.zeros_like}
        more = {name: make(given["input_ids"]) for name, make in beside.items() if name in self.encoder.random.inputs}
        return self.after({**given, **more}, 0)

    def after(self, feed: Feed, past: int) -> Feed:
        """Return inputs of both halves, with the first tokens in a cache that the model computes."""
        with torch.no_grad():
            _, cache = self.encoder.results(feed)
        held = [t[:, :, :past].contiguous() for t in tensors(cache.self_attention_cache)]
        later = {TOKENS: feed[TOKENS][:, past:].contiguous()}
        return feed | later | dict(zip(self.past, held, strict=True))

    def feeds(self, seed: int) -> dict[str, Feed]:
        """Return the inputs of `of_both` for this half alone, after the other half has run."""
        with torch.no_grad():
            return {name: self.behind(feed, self.encoder(feed)) for name, feed in self.of_both(seed).items()}


def paired(values: list[Tensor]) -> DynamicCache:
    """Return keys and values, given layer by layer, as a cache."""
    return DynamicCache(zip(values[::2], values[1::2], strict=True))


def cache_argument(model: PreTrainedModel) -> str:
    """Return the name of the model's argument for its cache."""
    taken = inspect.signature(model.forward).parameters
    return next(name for name in CACHES if name in taken)


def is_seq2seq(model: PreTrainedModel) -> bool:
    """Return whether a model scores the next token from an encoder's states and keeps keys and values of both."""
    taken = set(CACHES) & set(inspect.signature(model.forward).parameters)
    if TOKENS not in example_inputs(model) or not model.can_generate() or not taken:
        return False
    try:
        with torch.no_grad():
            found = model(**SinglePassModel(model).feeds(0)["two"], use_cache=True)
    except ValueError:  # its code refuses the switch, as that of Switch Transformers does for its encoder
        return False
    cache = next((found[name] for name in CACHES if found.get(name) is not None), None)
    if not isinstance(cache, EncoderDecoderCache):
        return False
    return all(map(holds_heads, [*cache.self_attention_cache.layers, *cache.cross_attention_cache.layers]))
