"""GGUF: one file of llama.cpp beside the float model's config, whose names and layouts transformers undoes.

Blocks are dequantized by the package gguf. Tensors are read, and not mapped, at the places that the header names.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quantize.checkpoint.files_seen import stamp
from quantize.checkpoint.safetensors_reader import read_into
from quantize.checkpoint.size_limits import limit_time
from quantize.checkpoint.sources.encoded import Encoded, Parts
from quantize.checkpoint.sources.gguf_header import Header, parse_header
from quantize.errors import ChangedError, QuantizeError, UsageError, reason

SUFFIX, SECONDS = ".gguf", 10.0  # of a core, for a header


def header_of(path: Path) -> Header:
    """Return the header of a file; it is kept as long as the file stays the same.

    Raises:
        UsageError: the package gguf is not there.
        QuantizeError: the file's header is not sound, or takes too long.
    """
    return cached_header(path, stamp(path))


@functools.lru_cache(4)
def cached_header(path: Path, seen: tuple[int, ...]) -> Header:
    """Read a header; `seen` tells states of the file apart."""
    try:
        with limit_time(SECONDS, "headers"):
            found = parse_header(path)
    except ImportError:
        raise UsageError(f"{path} is read by the package gguf: pip install 'gguf>=0.19,<0.20'") from None
    except (ValueError, OSError) as error:
        raise QuantizeError(f"{path} is truncated or no GGUF file ({reason(error)})") from None
    if any(place.offset + place.size > seen[0] for place in found.places.values()):
        raise QuantizeError(f"{path} is truncated: its header names more bytes than the file's {seen[0]}")
    return found


def read_floats(path: Path, name: str) -> Tensor:
    """Return a tensor in float32, as it lies in the file.

    Raises:
        QuantizeError: the package cannot dequantize it.
        ChangedError: the file has become shorter meanwhile.
    """
    from gguf.quants import dequantize

    place = header_of(path).places[name]
    raw = torch.empty(place.size, dtype=torch.uint8)
    with path.open("rb", buffering=0) as file:
        whole = read_into(file, place.offset, raw.numpy().data)
    if not whole:
        raise ChangedError(f"{path} has become shorter while it was read; start again with files that stay as they are")
    try:
        return torch.from_numpy(dequantize(raw.numpy(), place.kind)).view(place.shape)
    except (NotImplementedError, ValueError, RuntimeError) as error:
        raise QuantizeError(
            f"{name} of {path} cannot be dequantized from {place.kind.name} ({reason(error)})"
        ) from None


def find(path: Path, model: nn.Module) -> dict[str, Encoded]:
    """Return the parameters that a file holds, by the names that they have in the model.

    Raises:
        UsageError: transformers does not know the kind of model in GGUF, or it has stacks of experts.
        QuantizeError: the header is not sound.
    """
    from transformers import modeling_gguf_pytorch_utils as known

    config: Any = model.config
    kind, places = header_of(path).architecture, header_of(path).places
    processor = known.TENSOR_PROCESSORS.get(kind, known.TensorProcessor)(config=config.to_dict())
    try:
        names = known.get_gguf_hf_weights_map(model, processor)
    except NotImplementedError as error:
        raise UsageError(f"{path} holds a model that transformers does not read from GGUF: {reason(error)}") from None
    if experts := [name for name in places if "_exps." in name]:
        raise UsageError(f"{path} holds a mixture of experts ({experts[0]}), which is not read from GGUF yet")
    return {
        names[name]: Encoded({"values": name}, functools.partial(decode, processor, name))
        for name in places
        if name in names
    }


def decode(processor: Any, stored: str, name: str, parts: Parts) -> Tensor:
    """Return a parameter in float32, with llama.cpp's order of rows and offsets of norms undone."""
    del name
    found = processor.process(parts["values"].numpy(), stored).weights
    return torch.from_numpy(found.copy())
