"""What multiplies with a quantized weight holds its packed values, and what happens to the input in front of it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from quantize.formats.qtensor import QTensor
from quantize.scheme.scheme import Engine, Scheme
from quantize.transforms.online import Online


class QuantizedWeight(nn.Module):
    """The tensors of a quantized weight [N, K], the transforms of its input, and the bias of its output [N] or None.

    Shapes as in `QTensor`.

    Attributes:
        in_features: K.
        engine: how the product is computed on a CPU: `reference` unpacks the weight at each call and sums integers
            exactly; `fake_quant` holds the weight in floating point (`cpu_engine.py`).
    """

    qweight: Tensor
    scale: Tensor
    zero_point: Tensor | None
    global_scale: Tensor | None
    bias: Tensor | None

    def __init__(self, weight: QTensor, bias: Tensor | None, scheme: Scheme, online: Iterable[Online] = ()) -> None:
        super().__init__()
        self.scheme, self.in_features = scheme, weight.columns
        stored = {
            "qweight": weight.data,
            "scale": weight.scale,
            "zero_point": weight.zero_point,
            "global_scale": weight.global_scale,
        }
        for name, tensor in stored.items():
            self.register_buffer(name, tensor)
        self.register_buffer("bias", bias)
        self.online = tuple(online)
        self.transform = nn.Sequential(*self.online)
        self.engine: Engine = "reference"

    def weight_integers(self) -> Tensor:
        """int8 [N, K]."""
        return self.qtensor().unpack()

    def qtensor(self) -> QTensor:
        """Return the buffers as they are now, in one piece."""
        args = self.scheme.weights
        return QTensor(self.qweight, self.scale, self.zero_point, self.in_features, args, self.global_scale)

    def drop_laid_out(self) -> None:
        """Drop what was made of the buffers and is held beside them, since they move, change their type or values."""

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self.drop_laid_out()
        return super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.drop_laid_out()
        super()._load_from_state_dict(*args, **kwargs)
