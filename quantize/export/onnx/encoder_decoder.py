"""An encoder-decoder is exported as two files: one runs once for each input, and the other once for each token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import onnxruntime
import torch
from torch import Tensor

from quantize.export.onnx.encoder_decoder_parts import DecoderWithPast, EncoderWithCrossKV
from quantize.export.onnx.interface import Feed, Interface, Outputs

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ENCODER, DECODER = "encoder_model.onnx", "decoder_model.onnx"


class EncoderDecoder(Interface):
    """`EncoderWithCrossKV`, followed by `DecoderWithPast`.

    As in onnxruntime-genai, the encoder's file computes the keys and values of cross-attention, so the two files hold
    different weights. Files and caches have the names that optimum uses.
    """

    def __init__(self, encoder: EncoderWithCrossKV, decoder: DecoderWithPast) -> None:
        super().__init__(encoder.model)
        self.encoder, self.decoder = encoder, decoder
        self.outputs = encoder.outputs | decoder.outputs

    def files(self) -> dict[str, Interface]:
        """Return both halves by their files."""
        return {ENCODER: self.encoder, DECODER: self.decoder}

    def lowered(self) -> Interface:
        """Return a copy in which each half is lowered as it is in its file."""
        encoder, decoder = self.encoder.lowered(), self.decoder.lowered()
        assert isinstance(encoder, EncoderWithCrossKV)
        assert isinstance(decoder, DecoderWithPast)
        return EncoderDecoder(encoder, decoder)

    def forward(self, feed: Feed) -> tuple[Tensor, ...]:
        """Return all outputs of both halves."""
        encoded = self.encoder(feed)
        return (*encoded, *self.decoder(self.decoder.behind(feed, encoded)))

    def run_files(self, sessions: Sequence[onnxruntime.InferenceSession], feed: Feed) -> Outputs:
        """Return the same outputs from the files."""
        encoder, decoder = sessions
        encoded = self.encoder.run_files([encoder], taken(encoder, feed))
        behind = self.decoder.behind(feed, tuple(map(torch.from_numpy, encoded)))
        return [*encoded, *self.decoder.run_files([decoder], taken(decoder, behind))]

    def feed_of(self, given: Mapping[str, Tensor]) -> Feed:
        """Return the inputs of both halves for a sample."""
        return self.decoder.whole(given)

    def feeds(self, seed: int) -> dict[str, Feed]:
        """Return a prompt, one token after a cache, and two samples."""
        return self.decoder.of_both(seed)


def taken(session: onnxruntime.InferenceSession, feed: Feed) -> Feed:
    """Return those of some inputs that a file takes."""
    return {value.name: feed[value.name] for value in session.get_inputs()}


def encoder_decoder(model: PreTrainedModel) -> EncoderDecoder:
    """Return both halves of a model."""
    encoder = EncoderWithCrossKV(model)
    return EncoderDecoder(encoder, DecoderWithPast(encoder))
