"""An encoder-decoder in two halves, cut where nothing depends on the tokens that are made."""

from __future__ import annotations

import inspect
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
    """`encoder_hidden_states` float32 [batch, positions, channels] and what cross-attention makes of them, once.

    It is the whole model, of which the graph keeps what its outputs need: with the encoder those linears of the decoder
    that make keys and values of its states. The decoder's tokens are traced along and are no input of the file.

    Inputs: as `SinglePassModel`, but for `decoder_input_ids`.
    Outputs: `encoder_hidden_states`, and for each layer N `present.N.encoder.key` and `.value`, float32
    [batch, heads, positions, head_dim].
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
        """The names of the keys and values that go in or out, as optimum has them."""
        return [f"{stem}.{pair.format(half)}" for pair in self.pairs]

    def results(self, feed: Feed) -> tuple[Tensor, EncoderDecoderCache]:
        """The encoder's states, and the cache behind a first call of the whole model."""
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        given = {name: feed[name] for name in self.random.inputs}
        found = self.model(**given, **{cache_argument(self.model): cache}, use_cache=True)
        return found.encoder_last_hidden_state, cache

    def forward(self, feed: Feed) -> tuple[Tensor, ...]:
        """States, then keys and values layer by layer.

        The decoder makes keys and values for as many samples as it has tokens of, so it is given some for each: were
        that number read off its own tokens, the file would need them.
        """
        samples = feed[next(iter(self.inputs))].shape[0]
        states, cache = self.results(feed | {TOKENS: feed[TOKENS][:1].expand(samples, -1)})
        return (states, *tensors(cache.cross_attention_cache))

    def feeds(self, seed: int) -> dict[str, Feed]:
        """One, two and three samples."""
        return self.random.feeds(seed)


class DecoderWithPast(Interface):
    """`logits` float32 [batch, sequence, vocabulary] and the decoder's own cache behind these tokens.

    Inputs: `input_ids` int64 [batch, sequence]; where the graph reads them, `encoder_attention_mask` and
    `encoder_hidden_states`; for each layer N `past_key_values.N.decoder.key` and `.value`, float32
    [batch, heads, past, head_dim], past = 0 at the beginning, and `past_key_values.N.encoder.key` and `.value`, which
    the other half gives.
    Outputs: `logits`, `present.N.decoder.key` and `.value`, the past with the new tokens behind.
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
        """Logits, then the decoder's cache layer by layer, keys before values."""
        own, crossed = (paired([feed[name] for name in names]) for names in (self.past, self.crossed))
        cache = EncoderDecoderCache(own, crossed)
        cache.is_updated = dict.fromkeys(range(len(crossed.layers)), True)
        given: dict[str, Any] = {"attention_mask": feed[MASK]} if MASK in feed else {}
        given |= {TOKENS: feed["input_ids"], "encoder_outputs": (feed[STATES],), cache_argument(self.model): cache}
        logits = self.model(**given, use_cache=True).logits
        return (logits, *tensors(own))

    def behind(self, feed: Feed, encoded: tuple[Tensor, ...]) -> Feed:
        """What the file takes of both halves' inputs, and of what the other half gave."""
        known = {"input_ids": feed[TOKENS]} | {STATES: encoded[0]} | {name: feed[name] for name in self.past}
        known |= dict(zip(self.crossed, encoded[1:], strict=True))
        known |= {MASK: feed["attention_mask"]} if self.encoder.free else {}
        return {name: known[name] for name in self.inputs}

    def of_both(self, seed: int) -> dict[str, Feed]:
        """A prompt, one token behind a cache, and two samples, for both halves in one."""
        return {name: self.feed(*shape, seed) for name, shape in SHAPES.items()}

    def feed(self, batch: int, length: int, past: int, seed: int) -> Feed:
        """Random inputs of one shape, their past as the model has it."""
        feed = self.encoder.random.feed(batch, past + length, seed)
        with torch.no_grad():
            _, cache = self.encoder.results(feed)
        held = [t[:, :, :past].contiguous() for t in tensors(cache.self_attention_cache)]
        later = {TOKENS: feed[TOKENS][:, past:].contiguous()}
        return feed | later | dict(zip(self.past, held, strict=True))

    def feeds(self, seed: int) -> dict[str, Feed]:
        """As `of_both`, behind the other half."""
        with torch.no_grad():
            return {name: self.behind(feed, self.encoder(feed)) for name, feed in self.of_both(seed).items()}


def paired(values: list[Tensor]) -> DynamicCache:
    """Keys and values, layer by layer, as a cache."""
    return DynamicCache(zip(values[::2], values[1::2], strict=True))


def cache_argument(model: PreTrainedModel) -> str:
    """What the model calls its cache."""
    taken = inspect.signature(model.forward).parameters
    return next(name for name in CACHES if name in taken)


def is_seq2seq(model: PreTrainedModel) -> bool:
    """Whether a model scores the next token from an encoder's states and keeps keys and values of both."""
    taken = set(CACHES) & set(inspect.signature(model.forward).parameters)
    if TOKENS not in example_inputs(model) or not model.can_generate() or not taken:
        return False
    with torch.no_grad():
        found = model(**SinglePassModel(model).feeds(0)["two"], use_cache=True)
    cache = next((found[name] for name in CACHES if found.get(name) is not None), None)
    if not isinstance(cache, EncoderDecoderCache):
        return False
    return all(map(holds_heads, [*cache.self_attention_cache.layers, *cache.cross_attention_cache.layers]))
