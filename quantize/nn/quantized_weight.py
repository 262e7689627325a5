"""What multiplies with a quantized weight holds its packed values, and what happens to the input in front of it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from quantize.errors import UsageError
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


def alike(x: Tensor, y: Tensor) -> bool:
    """Return whether two tensors are of one dtype and on one device."""
    return (x.dtype, x.device) == (y.dtype, y.device)


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

    @abstractmethod
    def lay_out(self, dtype: torch.dtype) -> None:
        """Lay out the weight for good, for inputs of this dtype on its device: a compiler or a CUDA graph cannot.

        What GPU kernels read is held once: the integers as they are stored are freed, so that the module can neither
        move nor be saved.
        """

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

        A model must therefore be laid out (`lay_out`), or run once, before it is compiled.
        """
        self._packed = prepack_weight(self.qtensor(), self.scheme.activations)
        return self._packed

    @property
    def stored_form_dropped(self) -> bool:
        """Whether only what GPU kernels read is left of the weight (`lay_out`)."""
        return not self.qweight.numel()

    def require_stored(self) -> None:
        """Check that the weight is there as it is stored.

        Raises:
            UsageError: only what is laid out for the kernels of a device is.
        """
        if self.stored_form_dropped:
            raise UsageError(
                f"the weights are laid out for {self.scale.device} alone and can neither move nor be saved or copied; "
                "load the artifact with keep_stored=True, or anew"
            )

    def drop_laid_out(self) -> None:
        """Drop what was made of the buffers and is held beside them, since they move, change their type or values."""
        self._packed = None

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> Any:
        if self.stored_form_dropped and all(alike(x, fn(x)) for x in (self.qweight, self.scale)):
            return self
        self.require_stored()
        self.drop_laid_out()
        return super()._apply(fn, *args, **kwargs)  # type: ignore[no-untyped-call]

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.require_stored()
        super()._save_to_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.drop_laid_out()
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        """Return what copies hold, and what is serialized: FP8 as bytes."""
        self.require_stored()
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
