"""A linear layer of vLLM holds the rows of one or several quantized linears and multiplies with our kernels."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import LinearMethodBase, register_weight_loader_v2_supported_method
from vllm.model_executor.parameter import ChannelQuantScaleParameter, ModelWeightParameter, PerTensorScaleParameter
from vllm.utils.torch_utils import set_default_torch_dtype

from quantize.artifact.load import read_online
from quantize.artifact.manifest import Entry
from quantize.artifact.vllm.layers import require_split
from quantize.checkpoint.tensor_files import header_tensor
from quantize.formats.qtensor import QTensor
from quantize.nn.quantized_linear import QuantizedLinear
from quantize.scheme.scheme import Scheme

TENSORS = ("qweight", "scale", "zero_point", "global_scale")


class QuantizedPart(NamedTuple):
    """A quantized linear of the artifact: its path there, its entry in the settings, and its scheme."""

    path: str
    entry: Entry
    scheme: Scheme


@register_weight_loader_v2_supported_method
class ArtifactLinearMethod(LinearMethodBase):  # type: ignore[misc]
    """Holds the artifact's tensors of linears whose rows stand one below the other.

    Args:
        parts: the linears in order, whose weights have the same format and groups.
        files: tensor name → the artifact's file.
    """

    def __init__(self, parts: Sequence[QuantizedPart], files: Mapping[str, Path]) -> None:
        self.parts, self.files = parts, files
        self.rows, self.columns, self.dtype = list[int](), 0, torch.float32  # of this rank; the model's dtype

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
        """Register the tensors as vLLM fills them: the rows, and of a split input the columns, of this rank.

        Raises:
            UsageError: the columns cannot be split.
        """
        del output_size
        ranks, rows = input_size // input_size_per_partition, sum(output_partition_sizes)
        loads = {"weight_loader": options["weight_loader"]}
        for part in self.parts if ranks > 1 else ():
            require_split(part.path, part.entry, part.scheme, ranks)
        self.rows = output_partition_sizes if len(self.parts) > 1 else [rows]
        self.columns, self.dtype = input_size_per_partition, params_dtype
        for name in TENSORS:
            stored = f"{self.parts[0].path}.{name}"
            if stored not in self.files:
                continue
            like = header_tensor(self.files[stored], stored)
            if not like.dim():
                data = torch.empty(len(output_partition_sizes), dtype=like.dtype)
                parameter = PerTensorScaleParameter(data=data, **loads)
            elif like.shape[1] == 1:
                data = torch.empty(rows, 1, dtype=like.dtype)
                parameter = ChannelQuantScaleParameter(data=data, output_dim=0, **loads)
            else:
                data = torch.empty(rows, like.shape[1] // ranks, dtype=like.dtype)
                parameter = ModelWeightParameter(data=data, input_dim=1, output_dim=0, **loads)
            layer.register_parameter(name, parameter)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Make quantized linears of the tensors, one of all neighbours that quantize their input alike."""
        tensors = {name: getattr(layer, name).data for name in TENSORS if hasattr(layer, name)}
        for name in tensors:
            delattr(layer, name)
        scale, shared = tensors["scale"], tensors.pop("global_scale", None)
        if scale.element_size() > 1:  # rows that only fill up a vocabulary are all zeros
            scale.masked_fill_(scale == 0, 1)
        ends = list(itertools.accumulate(self.rows))
        starts, linears = [0, *ends[:-1]], []
        # The loader of vLLM makes the model's dtype and device the default, in which transforms must not be computed.
        with set_default_torch_dtype(torch.float32), torch.device("cpu"):
            for _, alike in itertools.groupby(range(len(self.parts)), lambda i: self.input_of(i, shared)):
                first, *rest = alike
                rows = slice(starts[first], ends[rest[-1] if rest else first])
                linears.append(self.linear(first, {n: t[rows] for n, t in tensors.items()}, shared))
        layer.quantized = nn.ModuleList(linears)

    def input_of(self, index: int, shared: Tensor | None) -> tuple[Any, ...]:
        """Return what linears must have in common to be multiplied as one."""
        part = self.parts[index]
        transforms = part.entry.online
        own = part.path if any(online["kind"] != "hadamard" for online in transforms) else ""
        return part.scheme, str(transforms), own, None if shared is None else float(shared[index])

    def linear(self, index: int, tensors: Mapping[str, Tensor], shared: Tensor | None) -> QuantizedLinear:
        """Return the quantized linear of some rows, laid out for the device that it is on."""
        part, device = self.parts[index], tensors["qweight"].device
        global_scale = None if shared is None else shared[index]
        weight = QTensor(
            tensors["qweight"], tensors["scale"], tensors.get("zero_point"), self.columns, part.scheme.weights,
            global_scale,
        )  # fmt: skip
        prefixes = [f"{part.path}.transform.{i}." for i in range(len(part.entry.online))]
        online = [
            read_online(prefix, given, self.files, self.columns)
            for prefix, given in zip(prefixes, part.entry.online, strict=True)
        ]
        linear = QuantizedLinear(weight, None, part.scheme, online).to(device).eval()
        linear.engine = "fake_quant"
        linear.lay_out(self.dtype)
        return linear

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """[..., K] → [..., N]."""
        linears: Any = layer.quantized
        outputs = [linear(x) for linear in linears]
        y = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)
        return y if bias is None else y + bias
