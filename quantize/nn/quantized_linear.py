"""The linear layer of a quantized model runs online transforms, the activation quantizer and the integer product."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from quantize.formats.fake_quantize import fake_quantize, quantizer_arguments
from quantize.formats.qtensor import CachedQTensor, QTensor
from quantize.graph.weight_attributes import WeightAttributes
from quantize.kernels.ops import quantized_linear, runtime_smooth_linear
from quantize.nn.cpu_engine import (
    LAST_INPUT,
    FloatWeight,
    fake_quant_linear,
    hold_weight,
    holds_integers,
    quantize_input,
    runs_fake_quant,
)
from quantize.nn.gpu_dispatch import gpu_linear, has_gpu_kernel, kernel_bits, split_fused_hadamard
from quantize.nn.prefix_tokens import PrefixTokens
from quantize.nn.quantized_weight import QuantizedWeight
from quantize.scheme.scheme import ActivationArgs, Scheme
from quantize.transforms.online import Online


class QuantizedLinear(QuantizedWeight):
    """Drop-in for `nn.Linear` that holds packed values of a number format.

    Forward takes [..., K] and gives [..., N] in the input's dtype.

    Attributes:
        leading: the tokens in front of each sequence, whose activations are not quantized.
    """

    def __init__(self, weight: QTensor, bias: Tensor | None, scheme: Scheme, online: Iterable[Online] = ()) -> None:
        super().__init__(weight, bias, scheme, online)
        self.out_features = weight.data.shape[0]
        has_tensors = any(part.state_dict() for part in self.online)  # tensors, which the settings do not tell apart
        self._transform_key = None if has_tensors else str([part.settings() for part in self.online])
        self.leading = PrefixTokens()
        self._held: FloatWeight | None = None
        self._unpacked: QTensor | None = None

    @property
    def weight(self) -> WeightAttributes:
        """The dtype, device and shape [N, K] of the weight, as some models ask for them before they call a linear."""
        floats = (x.dtype for x in (self.bias, self.scale, self.global_scale) if x is not None)
        dtype = next((found for found in floats if found.is_floating_point and found.itemsize > 1), torch.float32)
        return WeightAttributes(dtype, self.qweight.device, (self.out_features, self.in_features))

    def qtensor(self) -> QTensor:
        """Return the buffers as they are now, in one piece."""
        return self._unpacked or super().qtensor()

    @contextlib.contextmanager
    def unpacked(self, dtype: torch.dtype) -> Iterator[None]:
        """Unpack the weight to `dtype` once, however often the module is called until the `with` block ends.

        If activations stay in floating point, the product is taken in that dtype. Without a GPU's kernels others
        are multiplied as `fake_quant` does it, integers with the reference's result, FP4 with a sum that float32
        rounds: the reference's product for each group of 16 columns takes ten times as long.
        """
        self._unpacked, held = CachedQTensor.of(self.qtensor(), dtype), self._held
        try:
            yield
        finally:
            self._unpacked, self._held = None, held

    def held(self, dtype: torch.dtype) -> FloatWeight:
        """Return the weight as `fake_quant` reads it, made once, held beside the buffers, and never saved."""
        held, args = self._held, self.scheme.activations
        if held is None or held.values.dtype != dtype or held.args is not args:
            self._held = held = hold_weight(super().qtensor(), args, dtype)
        return held

    def lay_out(self, dtype: torch.dtype) -> None:
        """Lay out the weight for good; on a CPU beside what is stored."""
        x, args = torch.empty(1, self.in_features, dtype=dtype, device=self.qweight.device), self.scheme.activations
        if runs_fake_quant(x, args):
            self.held(dtype)
        elif has_gpu_kernel(x, self.qtensor(), args):
            self.packed()
            self.qweight = self.qweight.new_empty(0)

    def drop_laid_out(self) -> None:
        """Drop the weights that are laid out."""
        super().drop_laid_out()
        self._held = None

    def __getstate__(self) -> dict[str, Any]:
        """Return what copies and pickles hold, which is nothing that is laid out."""
        return super().__getstate__() | {"_held": None, "_unpacked": None}

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] → [..., N]."""
        args = self.scheme.activations
        held = self._unpacked is not None and args is not None and x.dtype == torch.float32
        fake_quant = (held or self.engine == "fake_quant") and runs_fake_quant(x, args)
        if held and not holds_integers(args, x.dtype):  # as on a CPU wherever there is no kernel
            fake_quant = fake_quant or not has_gpu_kernel(x, self.qtensor(), args)
        fake_quant = fake_quant and not (torch.compiler.is_compiling() and self._held is None)  # nothing is held yet
        rest = self._forward_fake_quant if fake_quant else self._forward_reference
        return self.leading.apart(x, lambda first: self._forward_float_activations(self.transform(first)), rest)

    def _forward_float_activations(self, x: Tensor) -> Tensor:
        """Multiply with activations as they are."""
        W = self.qtensor().dequantize()
        W = W if self._unpacked else W.to(x)
        return torch.nn.functional.linear(x.to(W), W, None if self.bias is None else self.bias.to(W)).to(x)

    def _forward_reference(self, x: Tensor) -> Tensor:
        """Multiply with activations that are transformed, and quantized as the scheme says."""
        weight, args = self.qtensor(), self.scheme.activations
        if args is None and self._unpacked:
            return self._forward_float_activations(self.transform(x))
        if has_gpu_kernel(x, weight, args):
            return self._forward_gpu(x, args)
        if args is None:
            return self._forward_float_activations(self.transform(x))
        operands = (self.transform(x), weight.unpack(), weight.unpack_scale(), self.zero_point, self.bias)
        if smooth := args.runtime_smooth:
            grid = (args.num_bits, args.symmetric, args.clip_ratio)
            return runtime_smooth_linear(*operands, *grid, smooth.group_size, smooth.normalize_tokens)
        return quantized_linear(*operands, *quantizer_arguments(args))

    def _forward_fake_quant(self, x: Tensor) -> Tensor:
        """Compute the same on a CPU in floating point."""
        weight, args = self.held(x.dtype), self.scheme.activations
        integers = weight.scale is not None
        shares = self._transform_key is not None and (args or self.online)  # otherwise there is nothing to share
        key = (self._transform_key, args, integers) if shares else None
        return fake_quant_linear(
            LAST_INPUT.get(x, key, lambda: quantize_input(self.transform(x), args, integers)), weight, self.bias
        )

    def _forward_gpu(self, x: Tensor, args: ActivationArgs | None) -> Tensor:
        """Compute the same on a GPU, where the quantizer takes a small Hadamard transform along."""
        online, hadamard = split_fused_hadamard(self.online) if args else (self.online, 0)
        for transform in online:
            x = transform(x)
        return gpu_linear(x, self.packed(), self.bias, kernel_bits(self.scheme.weights, args), args, hadamard)

    def fake_quantized(self, x: Tensor) -> Tensor:
        """Compute the same function in floating point, with a float product of quantized and dequantized operands."""
        return self._forward_float_activations(self.fake_input(x))

    def fake_input(self, x: Tensor) -> Tensor:
        """Return x as it reaches the product: behind the online transforms, quantized and dequantized."""
        args = self.scheme.activations
        return self.leading.apart(self.transform(x), lambda first: first, lambda rest: fake_quantize(rest, args))
