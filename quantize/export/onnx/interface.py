"""What an exported file takes and gives: named tensors, and the axes whose size is free."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from quantize.export.comparison import copy_with_replaced_linears
from quantize.export.onnx.lowering import lower
from quantize.nn.quantized_linear import QuantizedLinear

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Feed = dict[str, Tensor]  # by name, in the order of the file's inputs
Axes = dict[int, str]  # axis → name of its size
Outputs = list[NDArray[np.float32]]
IN_PLACE = "cache_in_place_below"  # metadata: fewer tokens than this go into a cache with room for them, in place
BATCH, SEQUENCE = "batch_size", "sequence_length"  # the names optimum and onnxruntime-genai use


class Interface(nn.Module):
    """A model as its ONNX file shows it: a dictionary of tensors in, a tuple of tensors out.

    Attributes:
        inputs: name → free axes.
        outputs: name → free axes, in the order in which `forward` returns them.
        lower: what computes a linear as the file does.
        optional: inputs that the file has only if its graph reads them.
        unread: inputs that are traced along, and that its graph must not read.
    """

    lower: Callable[[QuantizedLinear], nn.Module] = staticmethod(lower)
    optional: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()

    inputs: dict[str, Axes]
    outputs: dict[str, Axes]

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, feed: Feed) -> tuple[Tensor, ...]:
        """One tensor for each of `outputs`."""
        raise NotImplementedError

    def files(self) -> dict[str, Interface]:
        """File → what it takes and gives; one, but for models in parts."""
        return {"model.onnx": self}

    def lowered(self) -> Interface:
        """A copy that computes what the file does."""
        return copy_with_replaced_linears(self, self.lower)

    def graphs(self) -> Sequence[Interface]:
        """What is traced into the file; of several graphs one runs at a time."""
        return [self.lowered()]

    def run_files(self, sessions: Sequence[onnxruntime.InferenceSession], feed: Feed) -> Outputs:
        """What `forward` gives, from its files."""
        return list(sessions[0].run(None, {name: tensor.numpy() for name, tensor in feed.items()}))

    def feeds(self, seed: int) -> dict[str, Feed]:
        """Random inputs of three shapes, by the name of the shape; the same for every call with a seed."""
        raise NotImplementedError


def random_tokens(model: PreTrainedModel, batch: int, length: int, seed: int) -> Tensor:
    """int64 [batch, length]."""
    generator = torch.Generator().manual_seed(1000 * seed + length)
    vocabulary: int = model.get_input_embeddings().num_embeddings
    return torch.randint(vocabulary, (batch, length), generator=generator)
