"""A stack of experts becomes a product for each expert, whose rows are gathered in front of it and put back behind it.

It takes what any router chooses, every scheme, and whatever is computed between the products; what ONNX Runtime's own
operator for mixtures takes becomes that (`fused_experts.py`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from quantize.errors import QuantizeError
from quantize.export.comparison import Module, copy_with_replaced_linears
from quantize.export.onnx.fused_experts import fused
from quantize.graph.stack_stand_in import Stack
from quantize.nn.quantized_experts import QuantizedExperts, replace_parameter
from quantize.nn.quantized_linear import QuantizedLinear


class GatheredExperts(nn.Module, Stack):
    """What stands in the place of `QuantizedExperts`, with a lowered product for each expert.

    Attributes:
        count, in_features, out_features, transposed: as there.
        products: the experts' products, [..., K] → [..., N].
    """

    computes_in: Tensor

    def __init__(self, experts: QuantizedExperts, lower: Callable[[QuantizedLinear], nn.Module]) -> None:
        super().__init__()
        self.count, self.in_features, self.out_features = experts.count, experts.in_features, experts.out_features
        self.transposed = experts.transposed
        self.products = nn.ModuleList(lower(experts.expert(e)) for e in range(experts.count))
        self.register_buffer("computes_in", torch.empty(0), persistent=False)

    @property
    def experts(self) -> GatheredExperts:  # type: ignore[override]
        """The experts in whose place a `Stack` stands."""
        return self

    @property
    def index(self) -> None:  # type: ignore[override]
        """All experts."""
        return None

    @property
    def qweight(self) -> Tensor:
        """A tensor on the device of the products."""
        return self.computes_in

    def forward(self, x: Tensor, offs: Tensor | None = None) -> Tensor:
        """Multiply [count, S, K] by the experts: [count, S, N]."""
        if offs is not None:
            raise QuantizeError(
                "rows sorted by expert have no place in an ONNX graph; run the model with quantize.load"
            )
        return torch.stack([product(x[e]) for e, product in enumerate(self.products)])

    def by_row(self, x: Tensor, numbers: Tensor) -> Tensor:
        """Multiply x [S, m, K], where row s belongs to the expert `numbers` [S]: [S, m, N]."""
        y = x.new_zeros(x.shape[0], x.shape[1], self.out_features)
        for e, product in enumerate(self.products):
            (rows,) = torch.where(numbers == e)
            y = y.index_copy(0, rows, product(x[rows]))
        return y

    def expert_product(self, number: int, x: Tensor) -> Tensor:
        """Multiply x [..., K] by one expert: [..., N]."""
        y: Tensor = self.products[number](x)
        return y

    def weights(self) -> Tensor:
        """Refuse, as no operator in an ONNX graph takes all weights."""
        raise QuantizeError("the model computes with experts in a way that ONNX has no product for; use quantize.load")


def lowered_copy(model: Module, lower: Callable[[QuantizedLinear], nn.Module], standard: bool = False) -> Module:
    """Return a copy that computes what a file computes: each quantized linear, and each expert's, is lowered.

    Models of transformers then multiply each row by the weights of its expert, which a graph can hold.

    Args:
        model: the model or a module that holds it; it is not changed.
        lower: makes of a quantized linear what stands in its place.
        standard: whether the file must do without `QMoE`, which only ONNX Runtime has.
    """
    twin = copy_with_replaced_linears(model, lower)
    for path, module in list(twin.named_modules()):
        if not standard and (layer := fused(module, lower)) is not None:
            twin.set_submodule(path, layer)
    for path, module in list(twin.named_modules()):
        if isinstance(module, QuantizedExperts):
            replace_parameter(twin, path, GatheredExperts(module, lower))
    for module in twin.modules():
        if isinstance(module, PreTrainedModel) and module._can_set_experts_implementation():
            module.set_experts_implementation("batched_mm")
    return twin
