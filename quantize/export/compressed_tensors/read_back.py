"""Parameters are read back from a compressed-tensors checkpoint as its package unpacks them, and compared by number."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from quantize.checkpoint.key_mapping import map_keys
from quantize.checkpoint.tensor_files import index_tensors, read_tensor
from quantize.errors import QuantizeError
from quantize.export.comparison import relative_error
from quantize.export.compressed_tensors.experts import names_in_checkpoints
from quantize.export.compressed_tensors.experts_apart import Parts
from quantize.export.compressed_tensors.format import group, storage
from quantize.export.hf_checkpoint import check_difference
from quantize.export.outline import Outline
from quantize.scheme.scheme import Scheme


def read_back(
    written: Path, outline: Outline, schemes: Mapping[str, Scheme], stacks: Mapping[str, Parts]
) -> Callable[[str], Tensor]:
    """Return a function that reads a parameter of a mixture by its name.

    The package unpacks linears; those of a stack are put together by transformers' mapping, or as they were split.

    Args:
        written: the checkpoint.
        outline: the artifact's outline.
        schemes: the scheme of each quantized linear, by path.
        stacks: the linears in the place of each stack of experts.

    Raises:
        QuantizeError: the function's, where the checkpoint lacks the parameter.
    """
    files, names = index_tensors(written), names_in_checkpoints(outline)
    own = {path: [names[f"{path}.weight"].removesuffix(".weight")] for path in schemes if path not in stacks}
    own |= {path: list(parts.linears) for path, parts in stacks.items()}
    places = {place: scheme for path, scheme in schemes.items() for place in own[path]}
    paths = {name: name.rpartition(".")[0] for name in files}

    def read(name: str) -> Tensor:
        path = name.removesuffix(".weight")
        if path not in places:
            return read_tensor(files[name], name)
        parts = {part.removeprefix(f"{path}."): read_tensor(files[part], part) for part in paths if paths[part] == path}
        return unpacked(parts, places[path])

    plain = [name for name in files if paths[name] not in places or name.endswith(".bias")]
    stored = [*plain, *(f"{path}.weight" for path in places)]
    sources = map_keys(outline.skeleton, {name: name for name in stored})
    apart = {path: (parts, "weight") for path, parts in stacks.items() if not parts.mapped}
    apart |= {parts.bias: (parts, "bias") for parts, _ in [*apart.values()] if parts.bias}

    def parameter(name: str) -> Tensor:
        if name in apart:
            parts, kind = apart[name]
            rows = joined(parts, lambda place: read(f"{place}.{kind}") if kind == "weight" else linear_bias(place))
            shape = outline.skeleton.get_parameter(name).shape
            flipped = kind == "weight" and outline.settings["modules"][name]["transposed"]
            return rows.view(shape[0], shape[2], shape[1]).mT if flipped else rows.view(shape)
        if name not in sources:
            raise QuantizeError(
                f"the checkpoint holds no {name}, which the model needs; report the model and the recipe"
            )
        return sources[name].read(name, read)

    def linear_bias(place: str) -> Tensor:
        return read_tensor(files[f"{place}.bias"], f"{place}.bias")

    return parameter


def joined(parts: Parts, read: Callable[[str], Tensor]) -> Tensor:
    """Put the tensors [n, …] of the linears of a stack together: [E · N, …]."""
    tensors = {place: read(place) for place in parts.linears}
    first = next(iter(tensors.values()))
    whole = first.new_empty(sum(map(len, tensors.values())), *first.shape[1:])
    for place, rows in parts.linears.items():
        whole[rows] = tensors[place]
    return whole


def tensor_difference(read: Callable[[str], Tensor], model: nn.Module) -> float:
    """Return the largest ‖difference‖ / ‖parameter‖ of a checkpoint's parameters and those of a float model.

    Args:
        read: reads a parameter, as `read_back` returns it.
        model: the artifact in floating point, each parameter in the dtype that it is stored in.

    Raises:
        QuantizeError: a parameter is not there, or not the artifact's.
    """
    expected = {name: parameter.detach() for name, parameter in model.named_parameters()}
    worst = max(relative_error([read(name)], [tensor]) for name, tensor in expected.items())
    check_difference(worst, torch.finfo(torch.float32).eps, 0, [*expected.values()])
    return worst


def unpacked(tensors: Mapping[str, Tensor], scheme: Scheme) -> Tensor:
    """Return the weight [N, K] that the package makes of the tensors of one linear."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    compressor = BaseCompressor.get_value_from_registry(storage(scheme))
    weight: Tensor = compressor.decompress(dict(tensors), QuantizationScheme(**group(scheme, ["Linear"])))["weight"]
    return weight
