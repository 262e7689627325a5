"""What multiplies with a quantized weight holds its packed values, and what happens to the input in front of it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from quantize.formats.qtensor import QTensor
from quantize.nn.gpu_dispatch import Operands, prepack_weight
from quantize.scheme.scheme import Engine, Scheme
from quantize.transforms.online import Online


class FP8Bytes(NamedTuple):
    """A tensor of 8-bit floating point as uint8, since torch serializes no such tensors."""

    values: Tensor
    dtype: torch.dtype

    def restored(self) -> Tensor:
        """Return the tensor."""
        return self.values.view(self.dtype)


def as_bytes(x: Tensor | None) -> Tensor | FP8Bytes | None:
    """Return a tensor, or what stands for it where it is serialized."""
    fp8 = x is not None and x.is_floating_point() and x.element_size() == 1
    return FP8Bytes(x.view(torch.uint8), x.dtype) if fp8 and x is not None else x


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
        self._packed: Operands | None = None

    def weight_integers(self) -> Tensor:
        """int8 [N, K]."""
        return self.qtensor().unpack()

    def qtensor(self) -> QTensor:
        """Return the buffers as they are now, in one piece."""
        args = self.scheme.weights
        return QTensor(self.qweight, self.scale, self.zero_point, self.in_features, args, self.global_scale)

    def packed(self) -> Operands:
        """Return the weight as the GPU kernels read it, laid out once, held beside the buffers, and never saved."""
        return self._packed or self._prepack()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _prepack(self) -> Operands:
        """Lay out the weight eagerly, because the layout depends on the scales' values.

        A model must therefore run once before it is compiled.
        """
        self._packed = prepack_weight(self.qtensor(), self.scheme.activations)
        return self._packed

    def drop_laid_out(self) -> None:
        """Drop what was made of the buffers and is held beside them, since they move, change their type or values."""
        self._packed = None

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self.drop_laid_out()
        return super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.drop_laid_out()
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        """Return what copies hold, and what is serialized: FP8 as bytes."""
        return {
            **self.__dict__,
            "_packed": None,
            "_buffers": {name: as_bytes(buffer) for name, buffer in self._buffers.items()},
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore what `__getstate__` returned."""
        buffers = {
            name: buffer.restored() if isinstance(buffer, FP8Bytes) else buffer
            for name, buffer in state["_buffers"].items()
        }
        super().__setstate__(state | {"_buffers": buffers})  # type: ignore[no-untyped-call]
