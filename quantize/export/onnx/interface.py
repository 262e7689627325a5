"""The interface of an exported file is its named inputs and outputs, and the axes whose size is free."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from quantize.export.onnx.gathered_experts import lowered_copy
from quantize.export.onnx.lowering import lower
from quantize.nn.quantized_linear import QuantizedLinear

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Feed = dict[str, Tensor]  # by name, in the order of the file's inputs
Axes = dict[int, str]  # axis → name of its size
Outputs = list[NDArray[np.float32]]
IN_PLACE = "cache_in_place_below"  # metadata: fewer tokens than this are appended in place to a cache that has room
BATCH, SEQUENCE = "batch_size", "sequence_length"  # the names optimum and onnxruntime-genai use


class Interface(nn.Module):
    """A model as its ONNX file shows it: it maps a dictionary of tensors to a tuple of tensors.

    Attributes:
        inputs: name → free axes.
        outputs: name → free axes, in the order in which `forward` returns them.
        lower: a function from a quantized linear to a module that computes as the file does.
        optional: inputs that the file has only if its graph reads them.
        unread: inputs that tracing needs, and that the graph must not read.
        standard: whether the file has operators of the ONNX standard alone.
    """

    lower: Callable[[QuantizedLinear], nn.Module] = staticmethod(lower)
    optional: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()
    standard: bool = False

    inputs: dict[str, Axes]
    outputs: dict[str, Axes]

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, feed: Feed) -> tuple[Tensor, ...]:
        """Return one tensor for each of `outputs`."""
        raise NotImplementedError

    def files(self) -> dict[str, Interface]:
        """Return file → interface; this is one file, except for models in parts."""
        return {"model.onnx": self}

    def lowered(self) -> Interface:
        """Return a copy that computes what the file computes."""
        return lowered_copy(self, self.lower, self.standard)

    def graphs(self) -> Sequence[Interface]:
        """Return what is traced into the file; if there are several graphs, one runs at a time."""
        return [self.lowered()]

    def run_files(self, sessions: Sequence[onnxruntime.InferenceSession], feed: Feed) -> Outputs:
        """Return the outputs of `forward`, computed by the files."""
        return list(sessions[0].run(None, {name: tensor.numpy() for name, tensor in feed.items()}))

    def feed_of(self, given: Mapping[str, Tensor]) -> Feed | None:
        """Return the inputs for a whole sample, given as the artifact takes it; None if its tokens are not scored."""
        del given
        return None

    def feeds(self, seed: int) -> dict[str, Feed]:
        """Return random inputs of three shapes, by the name of the shape; a seed gives the same ones in every call."""
        raise NotImplementedError


def random_tokens(model: PreTrainedModel, batch: int, length: int, seed: int) -> Tensor:
    """Return int64 [batch, length]."""
    generator = torch.Generator().manual_seed(1000 * seed + length)
    return torch.randint(vocabulary_of(model), (batch, length), generator=generator)


def vocabulary_of(model: PreTrainedModel) -> int:
    """Return the number that token ids lie below: the config's, or the rows of the smallest table (CANINE)."""
    known = getattr(model.config.get_text_config(), "vocab_size", None)
    return int(known or min(m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)))
