"""Files that somebody else wrote are checked before they are opened, and parsed before anything in them is believed."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from quantize.checkpoint.paths import INDEX, LARGEST_JSON, SIDE_FILES
from quantize.checkpoint.safetensors_reader import read_header, read_rows, without_duplicates
from quantize.errors import QuantizeError, UsageError, shown

CAN_RUN_CODE = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".keras"}
LARGEST_SIDE_FILE = 1 << 28  # bytes; the largest tokenizers take a tenth of it


def check_files(directory: Path) -> None:
    """Check that nothing there that would be read is a link out of the directory, a device, or far too large.

    Raises:
        UsageError: something is not so; the message names the first such file.
    """
    if outside := links_followed(directory):
        raise UsageError(f"{outside[0]}; put the file itself there")


def links_followed(directory: Path) -> list[str]:
    """Check that all that would be read is a regular file, and say which of them are links out of the directory.

    The hub's cache links each file of a snapshot to the folder `blobs`, which is not worth a word.

    Raises:
        UsageError: there is something else; the message names the first such file.
    """
    root, found = directory.resolve(), []
    roots = [root, root.parents[1] / "blobs"] if root.parent.name == "snapshots" else [root]
    for path in sorted(directory.rglob("*")):
        if path.suffix not in SIDE_FILES | {".safetensors"} or is_hidden(path.relative_to(directory)) or path.is_dir():
            continue
        if not path.is_file():
            raise UsageError(f"{path} is no regular file; put one there, or remove it")
        if not any(path.resolve().is_relative_to(allowed) for allowed in roots):
            found.append(f"{path} is a link out of the directory, to {path.resolve()}")
        if path.suffix in SIDE_FILES and path.stat().st_size > LARGEST_SIDE_FILE:
            raise UsageError(
                f"{path} has {path.stat().st_size} bytes; files beside the weights may have {LARGEST_SIDE_FILE}, so "
                "remove it"
            )
    return found


def is_hidden(path: Path) -> bool:
    """Return whether a relative path, or a folder on it, begins with a dot."""
    return any(part.startswith(".") for part in path.parts)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        QuantizeError: the file is too large, is no JSON object, or has a key twice. OSError is left to the caller.
    """
    if path.stat().st_size > LARGEST_JSON:
        raise QuantizeError(f"{path} has {path.stat().st_size} bytes, more than JSON of a model ever has")
    try:
        found = parse_json(path.read_bytes())
    except ValueError as error:
        raise QuantizeError(f"{path} is no JSON: {error}") from None
    if not isinstance(found, dict):
        raise QuantizeError(f"{path} holds no JSON object")
    return found


def parse_json(text: str | bytes) -> Any:
    """Parse JSON in which no key stands twice.

    Raises:
        ValueError: the text is no such JSON, or is nested too deeply.
    """
    try:
        return json.loads(text, object_pairs_hook=without_duplicates)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_all(path: Path) -> dict[str, Tensor]:
    """Read all tensors of a safetensors file.

    Raises:
        QuantizeError: the file is damaged, or holds types that torch does not have.
    """
    return {name: read_rows(path, name) for name in read_header(path).entries}


def weight_files(directory: Path) -> list[Path]:
    """Return the safetensors files of a model: those that its index names, or all of them if it has no index.

    Raises:
        UsageError: there are no such files.
        QuantizeError: the index names a file that is missing or does not lie in the directory.
    """
    index = directory / INDEX
    files = sorted(directory.glob("*.safetensors")) if not index.is_file() else indexed(index)
    if files:
        return files
    others = sorted(path.name for path in directory.iterdir() if path.suffix in CAN_RUN_CODE)
    instead = f" but {others[0]}, which can hold code and is never opened" if others else ""
    raise UsageError(
        f"{directory} holds no .safetensors weights{instead}; convert the model with save_pretrained first"
    )


def has_config_alone(directory: Path) -> bool:
    """Return whether a directory holds no weights of any kind."""
    kinds = CAN_RUN_CODE | {".safetensors"}
    return not (directory / INDEX).is_file() and not any(path.suffix in kinds for path in directory.iterdir())


def indexed(index: Path) -> list[Path]:
    """Return the files that an index of shards names."""
    return [shard(index, name) for name in unique(weight_map(index).values())]


def indexed_names(index: Path) -> set[str]:
    """Return the names in an index of shards that may be those of files."""
    return {name for name in weight_map(index).values() if isinstance(name, str)}


def weight_map(index: Path) -> dict[str, Any]:
    """Return the map of an index of shards, from tensor names to what should be files."""
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict):
        raise QuantizeError(f"{index} holds no weight_map")
    return shards


def shard(index: Path, name: Any) -> Path:
    """Return the path of a file beside the index."""
    if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
        raise QuantizeError(f"{index} names {shown(name)}; only .safetensors files of the same directory are read")
    if name not in os.listdir(index.parent):  # noqa: PTH208  `is_file` of a name that is too long is an error
        raise QuantizeError(f"{index.parent} holds no {shown(name)}, which {index.name} names; fetch the whole model")
    return index.with_name(name)


def unique(values: Iterable[Any]) -> list[Any]:
    """Return each value once, sorted by its repr, so that values of any type have an order."""
    return [value for _, value in sorted({repr(value): value for value in values}.items())]
