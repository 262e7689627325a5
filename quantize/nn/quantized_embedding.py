"""The table of words of a quantized model holds 8-bit integers with one scale for each row."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from quantize.errors import QuantizeError
from quantize.formats.qtensor import CachedQTensor, QTensor
from quantize.graph.weight_attributes import WeightAttributes
from quantize.scheme.scheme import TABLE_SCHEME


def look_up(qweight: Tensor, scale: Tensor, ids: Tensor) -> Tensor:
    """Return rows of a table, dequantized: int8 [V, K], scale [V, 1] and ids [...] → [..., K] in the scale's dtype."""
    q: Tensor = nn.functional.embedding(ids, qweight)
    return q.to(scale.dtype) * nn.functional.embedding(ids, scale)


class Lookup:
    """A lookup that runs in place of a node `embedding`, whose first argument is then the table's integers."""

    def __init__(self, scale: Tensor) -> None:
        self.scale = scale

    def __call__(self, qweight: Tensor, ids: Tensor, *options: Any, **more: Any) -> Tensor:
        """Return float32 [..., K]; the node's other arguments are for training."""
        del options, more
        return look_up(qweight, self.scale.float(), ids)


class QuantizedEmbedding(nn.Embedding):
    """An `nn.Embedding` whose table is `qweight` int8 [V, K] · `scale` [V, 1]; a lookup dequantizes the rows it reads.

    A class that derives from `nn.Embedding` and does more to the rows keeps doing so: `quantize_embedding` lets its
    `super().forward` end here.
    """

    qweight: Tensor
    scale: Tensor

    def forward(self, ids: Tensor) -> Tensor:
        """Map ids [...] to [..., K]."""
        return look_up(self.qweight, self.scale, ids)

    @property
    def weight(self) -> WeightAttributes:  # type: ignore[override]
        """The dtype, device and shape of the table, as some models ask for them before they look up."""
        return WeightAttributes(self.scale.dtype, self.qweight.device, tuple(self.qweight.shape))

    def dequantize(self, dtype: torch.dtype) -> None:
        """Hold the table in floating point from now on, with its values rounded to `dtype`."""
        table = dequantized_table(self.qweight, self.scale, dtype)
        del self.qweight, self.scale
        self.__class__ = nn.Embedding if type(self) is QuantizedEmbedding else type(self).__bases__[0]
        self.register_parameter("weight", nn.Parameter(table.float(), requires_grad=False))


def quantize_embedding(module: nn.Module, qweight: Tensor, scale: Tensor, path: str) -> None:
    """Turn an `nn.Embedding`, or a module of a class that derives from it, into a `QuantizedEmbedding` in place.

    Raises:
        QuantizeError: the module is no embedding, or has another shape.
    """
    if not qweight.is_meta:
        table_of(qweight, scale).check(path)
    if not isinstance(module, nn.Embedding) or (module.num_embeddings, module.embedding_dim) != tuple(qweight.shape):
        raise QuantizeError(f"{path} holds no table of {qweight.shape[0]} rows and {qweight.shape[-1]} columns")
    own = type(module)
    del module.weight
    bases = (own, QuantizedEmbedding)
    module.__class__ = QuantizedEmbedding if own is nn.Embedding else type(f"Quantized{own.__name__}", bases, {})
    module.register_buffer("qweight", qweight)
    module.register_buffer("scale", scale)


def table_of(qweight: Tensor, scale: Tensor) -> QTensor:
    """Return the tensors of a table as one quantized matrix [V, K]."""
    columns = qweight.shape[-1] if qweight.dim() else 0
    return QTensor(qweight, scale, None, columns, TABLE_SCHEME.weights)


def dequantized_table(qweight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a table [V, K] in a dtype, made a few rows at a time."""
    return CachedQTensor.of(table_of(qweight, scale), dtype).dequantize()
