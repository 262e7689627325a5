"""A layer of experts becomes one `QMoE` of ONNX Runtime, where 4-bit weights and a SwiGLU between them are its form.

The operator multiplies the rows of all experts at once, chosen and weighted as the model's own router says. The more
experts a layer has, the faster it is than a product for each, which other layers become (`gathered_experts.py`).
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any, TypeGuard

import onnxruntime
import torch
from torch import Tensor, nn

from quantize.export.onnx.matmul_nbits import BlockLinear, dequantized_blocks, int8_blocks
from quantize.export.swiglu import SwiGLU, swiglu_of
from quantize.nn.quantized_experts import QuantizedExperts
from quantize.nn.quantized_linear import QuantizedLinear

SINCE = (1, 32)  # of ONNX Runtime; older ones were not tried, and below 1.25 the operator chooses by itself
BUFFERS = ("packed", "scale", "zero_point", "bias")  # of a `BlockLinear`


class FusedExperts(nn.Module):
    """Experts between a router and the sum of their outputs, as transformers calls them.

    Gates and linear values of the first product take turns here, as the operator wants them. Shapes of its buffers:
    `packed_0` uint8 [E, 2 I, H / 2], `scale_0` float32 [E, 2 I, H / block], `zero_point_0` uint8
    [E, 2 I, ⌈H / block / 2⌉] or None, `bias_0` float32 [E, 2 I] or None. Those of the second one end in `_1`.

    Args:
        products: what the experts' first and second linears are lowered to.
        biases: [E, 2 I] and [E, H], which the layer adds itself; each may be None.
        gate: what is computed between the products.
    """

    def __init__(self, products: list[list[BlockLinear]], biases: list[Tensor | None], gate: SwiGLU) -> None:
        super().__init__()
        first = products[0][0]
        self.count, self.block, self.transform = len(products[0]), first.block, first.transform
        self.quantizes_activations = first.quantizes_activations
        self.gate = dataclasses.replace(gate, interleaved=True)
        turns = torch.arange(first.out_features)
        turns = turns if gate.interleaved else turns.reshape(2, -1).T.flatten()
        orders: tuple[Any, Any] = (turns, slice(None))
        for number, (linears, bias, order) in enumerate(zip(products, biases, orders, strict=True)):
            for name in BUFFERS:
                given = [getattr(linear, name) for linear in linears]
                found = None if given[0] is None else torch.stack(given)
                if name == "bias" and bias is not None:
                    found = bias.detach().float() + (0 if found is None else found)
                if found is not None:
                    found = found.flatten(2) if name == "packed" else found
                    found = found[:, order].contiguous()
                self.register_buffer(f"{name}_{number}", found)

    def forward(self, x: Tensor, numbers: Tensor, weights: Tensor) -> Tensor:
        """Map rows x [T, H] to [T, H]: the sum of the experts `numbers` int64 [T, k], times `weights` [T, k]."""
        x = self.transform(x)
        if torch.onnx.is_in_onnx_export():
            return self.operator(x, numbers, weights)
        y = torch.zeros_like(x)
        for e in range(self.count):
            rows, places = torch.where(numbers == e)
            inner = self.gate(self.product(0, e, x[rows]))
            y = y.index_add(0, rows, self.product(1, e, inner) * weights[rows, places, None])
        return y

    def product(self, number: int, expert: int, x: Tensor) -> Tensor:
        """Multiply x [S, K] by the first or second weight of an expert, as the operator does: [S, N]."""
        x = int8_blocks(x, self.block) if self.quantizes_activations else x
        packed, scale, zero_point, bias = (None if part is None else part[expert] for part in self.buffers_of(number))
        assert packed is not None and scale is not None
        return nn.functional.linear(x, dequantized_blocks(packed, scale, zero_point), bias)

    def buffers_of(self, number: int) -> list[Tensor | None]:
        """Return `BUFFERS` of the first or second product."""
        return [getattr(self, f"{name}_{number}") for name in BUFFERS]

    def operator(self, x: Tensor, numbers: Tensor, weights: Tensor) -> Tensor:
        """Emit the ONNX node; it takes the k largest of what is 1 for the router's choice and else 0."""
        nowhere = x.new_zeros(x.shape[0], self.count)
        chosen, weighted = nowhere.scatter(1, numbers, 1.0), nowhere.scatter(1, numbers, weights.to(x.dtype))
        (packed_0, scale_0, zero_0, bias_0), (packed_1, scale_1, zero_1, bias_1) = map(self.buffers_of, (0, 1))
        third = (None, None, None)  # gates apart from linear values
        gate = {"activation_alpha": self.gate.alpha, "activation_beta": self.gate.beta}
        gate |= {} if math.isinf(self.gate.limit) else {"swiglu_limit": self.gate.limit}
        return torch.onnx.ops.symbolic(
            "com.microsoft::QMoE",
            (x, chosen, packed_0, scale_0, bias_0, packed_1, scale_1, bias_1, *third, zero_0, zero_1, None, weighted),
            {
                "k": numbers.shape[1],
                "expert_weight_bits": 4,
                "block_size": self.block,
                "weights_prepacked": 0,
                "accuracy_level": 4 if self.quantizes_activations else 0,
                "normalize_routing_weights": 0,
                "activation_type": "swiglu",
                "swiglu_fusion": 1,
                **gate,
            },
            dtype=x.dtype,
            shape=x.shape,
            version=1,
        )


def fused(experts: nn.Module, lower: Callable[[QuantizedLinear], nn.Module]) -> FusedExperts | None:
    """Return what stands in the place of a layer's experts, or None where they are not of the operator's form.

    They are if ONNX Runtime is new enough, they are called as transformers calls experts
    (`use_experts_implementation`), nothing is computed between their two products but a SwiGLU and nothing behind them,
    and their linears become `BlockLinear`s with blocks that leave no rest, and zero points that are integers; only the
    first ones may have online transforms. The blocks of both are as large as the smaller ones.
    """
    if tuple(map(int, onnxruntime.__version__.split(".")[:2])) < SINCE:
        return None
    between: Any = getattr(experts, "_apply_gate", None)
    stacks = in_order({name: x for name, x in experts.named_children() if isinstance(x, QuantizedExperts)})
    if not stacks or between is None or not experts.has_gate or experts.has_post_expert_norm:
        return None
    (_, first), (_, second) = stacks.items()
    singles = [linear for stack in (first, second) if is_of_the_form(linear := lower(stack.expert(0)))]
    alike = len({linear.quantizes_activations for linear in singles}) == 1
    gate = swiglu_of(between, first.out_features)
    if gate is None or len(singles) < len(stacks) or not alike or second.online:
        return None
    block = min(linear.block for linear in singles)
    products = [[BlockLinear(stack.expert(e), block) for e in range(stack.count)] for stack in (first, second)]
    return FusedExperts(products, [getattr(experts, f"{name}_bias", None) for name in stacks], gate)


def in_order(stacks: dict[str, QuantizedExperts]) -> dict[str, QuantizedExperts]:
    """Return two stacks in the order of their products, between which a gate halves the outputs; else none."""
    for (name, first), (other, second) in itertools.permutations(stacks.items(), 2) if len(stacks) == 2 else ():
        if (second.in_features, second.out_features) == (first.out_features // 2, first.in_features):
            return {name: first, other: second}
    return {}


def is_of_the_form(linear: nn.Module) -> TypeGuard[BlockLinear]:
    """Return whether an expert's lowered linear has the operator's form."""
    if not isinstance(linear, BlockLinear) or linear.in_features % linear.block:
        return False
    return linear.zero_point is None or not linear.zero_point.is_floating_point()
