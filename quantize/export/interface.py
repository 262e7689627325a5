"""What an exported file takes and gives: named tensors, and the axes whose size is free."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from quantize.export.onnx_linear import lower

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Feed = dict[str, Tensor]  # by name, in the order of the file's inputs
Axes = dict[int, str]  # axis → name of its size
BATCH, SEQUENCE = "batch_size", "sequence_length"  # the names optimum and onnxruntime-genai use


class Interface(nn.Module):
    """A model as its ONNX file shows it: a dictionary of tensors in, a tuple of tensors out.

    Attributes:
        inputs: name → free axes.
        outputs: name → free axes, in the order in which `forward` returns them.
        lower: what its linears become in the file.
    """

    lower = staticmethod(lower)

    inputs: dict[str, Axes]
    outputs: dict[str, Axes]

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, feed: Feed) -> tuple[Tensor, ...]:
        """One tensor for each of `outputs`."""
        raise NotImplementedError

    def feeds(self, seed: int) -> dict[str, Feed]:
        """Random inputs of three shapes, by the name of the shape; the same for every call with a seed."""
        raise NotImplementedError


def random_tokens(model: PreTrainedModel, batch: int, length: int, seed: int) -> Tensor:
    """int64 [batch, length]."""
    generator = torch.Generator().manual_seed(1000 * seed + length)
    vocabulary: int = model.get_input_embeddings().num_embeddings
    return torch.randint(vocabulary, (batch, length), generator=generator)
