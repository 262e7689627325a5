"""Encoders, and models of images and sound, are exported as one pass over whole inputs."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from quantize.export.onnx.interface import BATCH, SEQUENCE, Axes, Feed, Interface, random_tokens
from quantize.export.onnx.lowering import lower_for_prefill
from quantize.graph.export import forward_switches
from quantize.graph.inputs import example_inputs

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SHAPES = {"one": (1, 9), "two": (2, 7), "three": (3, 5)}  # samples, and tokens of each
AXES = {"decoder_input_ids": {0: BATCH, 1: f"decoder_{SEQUENCE}"}, "input_ids": {0: BATCH, 1: SEQUENCE}}


class SinglePassModel(Interface):
    """A model without a cache, which returns `logits` if it has them, otherwise `last_hidden_state`.

    Token ids are int64 [batch, sequence]; `input_ids` come with `attention_mask` and, if the model distinguishes
    segments, `token_type_ids`. Other inputs are those that the model is quantized with: `pixel_values` float32
    [batch, channels, height, width], `input_features` float32 [batch, bins, frames], `decoder_input_ids`.
    """

    lower = staticmethod(lower_for_prefill)

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        self.main = example_inputs(model)
        self.inputs = {name: AXES.get(name, {0: BATCH}) for name in self.main}
        if "input_ids" in self.main:
            self.inputs |= dict.fromkeys(beside_tokens(model), AXES["input_ids"])
        with torch.no_grad():
            found = self.results(self.feeds(0)["two"])
        self.output = "logits" if "logits" in found else "last_hidden_state"
        self.outputs = {self.output: self.free(self.chosen(found))}

    def results(self, feed: Feed) -> Any:
        """Return what the model returns."""
        return self.model(**feed, **forward_switches(self.model))

    def chosen(self, found: Any) -> Tensor:
        """Return the output that is exported: `self.output`, or the first one if there is none of that name."""
        output: Tensor = found[self.output if self.output in found else 0]
        return output

    def free(self, output: Tensor) -> Axes:
        """Return the free axes of the output: those of the tokens that it scores, otherwise only the samples."""
        tokens = next((axes for name, axes in AXES.items() if name in self.main), {0: BATCH})
        return tokens if output.dim() == 3 else {0: BATCH}

    def forward(self, feed: Feed) -> tuple[Tensor, ...]:
        """Return the only output."""
        return (self.chosen(self.results(feed)),)

    def feeds(self, seed: int) -> dict[str, Feed]:
        """Return one, two and three samples; if there are several, the first ends with padding."""
        return {name: self.feed(*shape, seed) for name, shape in SHAPES.items()}

    def feed(self, batch: int, length: int, seed: int) -> Feed:
        """Return random inputs of one shape."""
        generator = torch.Generator().manual_seed(1000 * seed + length)
        feed: Feed = {}
        for name in self.inputs:
            if name == "attention_mask":
                feed[name] = torch.ones(batch, length, dtype=torch.long)
                feed[name][0, -2:] = int(batch == 1)
            elif name == "token_type_ids":
                feed[name] = (torch.arange(length) >= length // 2).long().expand(batch, length).contiguous()
            elif name in AXES:
                feed[name] = random_tokens(self.model, batch, length, seed)
            else:
                feed[name] = torch.randn(batch, *self.main[name].example.shape[1:], generator=generator)
        return feed


def beside_tokens(model: PreTrainedModel) -> list[str]:
    """Return the inputs that go with `input_ids`; segments are left out if the model has only one type of them."""
    taken = inspect.signature(model.forward).parameters
    segments = getattr(model.config, "type_vocab_size", 0) > 1
    return [name for name in ("attention_mask", *["token_type_ids"] * segments) if name in taken]
