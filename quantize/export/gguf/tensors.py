"""The tensors of an artifact become those of a GGUF file, under its names and in its order of rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from gguf import TensorNameMap, get_tensor_name_map
from rich.console import Console
from torch import Tensor

from quantize.export.gguf.architectures import ARCHITECTURES, head_dim, rope_factors
from quantize.export.gguf.blocks import Blocks, blocks, plain
from quantize.export.hf_checkpoint import converted
from quantize.export.outline import Outline
from quantize.formats.qtensor import QTensor
from quantize.nn.quantized_embedding import table_of
from quantize.nn.quantized_experts import QuantizedExperts
from quantize.nn.quantized_linear import QuantizedLinear

WORDS, HEAD = "token_embd.weight", "output.weight"


def gguf_tensors(directory: Path, outline: Outline, console: Console | None) -> Iterator[tuple[str, Blocks]]:
    """Yield the tensors of an artifact by their names in a GGUF file, one linear in memory at a time.

    The linear that scores the vocabulary is left out where it is the table of words, which then takes its place.
    """
    config = outline.model_config()
    names, held = name_map(config), dict[str, Blocks]()

    def as_blocks(path: str, linear: QuantizedLinear | QuantizedExperts) -> dict[str, Blocks]:
        order = row_order(path, len(linear.qweight), config)
        bias = {} if linear.bias is None else {f"{path}.bias": plain(rows(linear.bias, order))}
        return {f"{path}.weight": blocks(reordered(linear.qtensor(), order))} | bias

    def table(qweight: Tensor, scale: Tensor) -> Blocks:
        return blocks(table_of(qweight, scale))

    for _, tensors in converted(directory, outline, as_blocks, console, table):
        for name, tensor in tensors.items():
            if isinstance(tensor, Tensor):
                tensor = in_floating_point(name, tensor, config)
            found = gguf_name(names, name)
            if found in (WORDS, HEAD):
                held[found] = tensor
                continue
            yield found, tensor
            if tensor.scale is not None:
                yield f"{found.removesuffix('.weight')}.scale", plain(tensor.scale)
    if len(held) == 2 and equal(held[WORDS], held[HEAD]):
        del held[HEAD]
    yield from held.items()
    if (factors := rope_factors(config)) is not None:
        yield "rope_freqs.weight", plain(factors)


def in_floating_point(name: str, tensor: Tensor, config: Mapping[str, Any]) -> Blocks:
    """Return a parameter that is not quantized; gains of norms are shifted as the architecture asks for."""
    path, _, leaf = name.rpartition(".")
    tensor = rows(tensor, row_order(path, len(tensor), config))
    if tensor.dim() == 1 and leaf == "weight":
        tensor = tensor.float() + ARCHITECTURES[config["model_type"]].norm_shift
    return plain(tensor)


def name_map(config: Mapping[str, Any]) -> TensorNameMap:
    """Return the package's map from names of transformers to those of a GGUF file."""
    return get_tensor_name_map(ARCHITECTURES[config["model_type"]].arch, config["num_hidden_layers"])


def gguf_name(names: TensorNameMap, name: str) -> str:
    """Return the name in a GGUF file; each tensor of a known architecture has one."""
    found: str | None = names.get_name(name, try_suffixes=(".weight", ".bias"))
    assert found is not None, name
    return found


def equal(one: Blocks, other: Blocks) -> bool:
    """Return whether two matrices are the same."""
    return one.type == other.type and torch.equal(one.data, other.data)


def row_order(path: str, count: int, config: Mapping[str, Any]) -> Tensor | None:
    """Return which row comes first, second, … where the format has another order than transformers; otherwise None.

    Where ggml rotates channels 2i and 2i + 1 of a head together, transformers rotates i and i + head_dim / 2.
    """
    if path.rpartition(".")[2] not in ARCHITECTURES[config["model_type"]].interleaved:
        return None
    return torch.arange(count).view(-1, 2, head_dim(config) // 2).transpose(1, 2).flatten()


def rows(tensor: Tensor, order: Tensor | None) -> Tensor:
    """Return a tensor with its rows in an order."""
    return tensor if order is None else tensor[order]


def reordered(weight: QTensor, order: Tensor | None) -> QTensor:
    """Return a quantized weight with its rows in an order; each takes its scales along."""
    if order is None:
        return weight
    zero_point = None if weight.zero_point is None else weight.zero_point[order]
    return replace(weight, data=weight.data[order], scale=weight.scale[order], zero_point=zero_point)
