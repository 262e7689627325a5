"""A table of words in 8 bits in vLLM."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.parameter import ChannelQuantScaleParameter

from quantize.nn.quantized_embedding import look_up


class ArtifactTableMethod(QuantizeMethodBase):  # type: ignore[misc]
    """Holds integers [V, K] with one scale for each row, and dequantizes the rows that are looked up."""

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **options: Any,
    ) -> None:
        """Register the rows of this rank."""
        del input_size, output_size
        for name, columns, dtype in (("qweight", input_size_per_partition, torch.int8), ("scale", 1, params_dtype)):
            data = torch.empty(sum(output_partition_sizes), columns, dtype=dtype)
            parameter = ChannelQuantScaleParameter(data=data, output_dim=0, weight_loader=options["weight_loader"])
            layer.register_parameter(name, parameter)

    def embedding(self, layer: nn.Module, input_: Tensor) -> Tensor:
        """Map ids [...] to [..., K]."""
        qweight, scale = (layer.get_parameter(name) for name in ("qweight", "scale"))
        return look_up(qweight, scale, input_)

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Refuse, as a head of its own is a quantized linear.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("a table of words in 8 bits is not multiplied with")
