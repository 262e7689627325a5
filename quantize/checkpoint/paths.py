"""Paths that a person gives are checked before anything slow is imported."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from quantize.errors import UsageError, shown

ADAPTER = "adapter_config.json"
LARGEST_ADAPTER_CONFIG = 1 << 20  # bytes
HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?(@[\w.-][\w./-]*)?")
SIDE_FILES = {".json", ".jinja", ".model", ".txt", ".tiktoken"}  # what a model has beside its weights
RUN_IN_TRANSFORMERS = ("safetensors-float", "compressed-tensors")  # exports
LARGEST_MANIFEST = 1 << 25  # bytes
LARGEST_JSON = 1 << 25  # bytes of a config, index or manifest, which take fifty times as much memory when parsed
LARGEST_HEADER = 100_000_000  # bytes of a safetensors file's header, as in the format's own library
LONGEST_NAME = 1 << 12  # characters of a tensor's name, which is compared with patterns and with other names
INDEX = "model.safetensors.index.json"
DATA_SET = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(:[\w.-]+){0,2}")  # owner/name, a configuration and a split
FILES_OF_DATA_SETS = (".arrow", ".parquet")
FILES_OF_MODELS = {
    ".gguf": "is a GGUF file, and no config.json lies beside it; put the float model's there, and its tokenizer",
    ".onnx": "is an exported model; give the directory of the model that it was made of",
    ".safetensors": "is one file of a model, and no config.json lies beside it; put the model's there",
}


def find_model(model: str | Path) -> Path | None:
    """Return the directory of a model, its one file of weights, or None for what may be a hub id.

    Raises:
        UsageError: the model is neither.
    """
    path = Path(model)
    if path.is_dir():
        require_config(path)
        return path
    if path.suffix in (".safetensors", ".gguf") and path.is_file() and path.with_name("config.json").is_file():
        return path
    if path.is_file():
        other = "is a file; give a directory with a config.json and .safetensors weights"
        raise UsageError(f"{path} {FILES_OF_MODELS.get(path.suffix, other)}")
    if not HUB_ID.fullmatch(str(model)):
        raise UsageError(f"no such model directory: {model}")
    return None


def check_low_disk(model: object, low_disk: bool) -> None:
    """Check that a model lies on the hub, if few of its files shall be on disk at a time.

    Raises:
        UsageError: it does not.
    """
    if low_disk and (not isinstance(model, str | Path) or find_model(model) is not None):
        raise UsageError("--low-disk is for a model on the hub, and this one is here already; leave it out")


def folder_of(place: Path) -> Path:
    """Return the directory that a model's one file lies in, or the directory itself."""
    return place.parent if place.is_file() else place


def require_config(directory: Path) -> Path:
    """Return the path of a model's config.

    Raises:
        UsageError: there is none.
    """
    path = directory / "config.json"
    if not path.is_file() and (directory / ADAPTER).is_file():
        raise UsageError(
            f"{directory} holds an adapter{base_of(directory / ADAPTER)}; give the base with --adapter {directory}"
        )
    if not path.is_file():
        raise UsageError(f"{directory} holds no config.json, so it is no model directory")
    return path


def base_of(path: Path) -> str:
    """Return ` of NAME` for the base that an adapter's config names, or ''."""
    found = glance(path, LARGEST_ADAPTER_CONFIG).get("base_model_name_or_path")
    return f" of {shown(found)}" if isinstance(found, str) and found else ""


def glance(path: Path, largest: int, counted: bool = False) -> dict[str, Any]:
    """Return the JSON object in a file of at most `largest` bytes, or nothing; what matters of it is checked later.

    Where it is `counted`, as in safetensors files, its length stands before it in 8 bytes.
    """
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little") if counted else largest
            found = json.loads(file.read(min(length, largest)))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def require_artifact(directory: Path, exports: Collection[str] = ()) -> None:
    """Check at a glance that a directory holds an artifact, or an export of one of some formats.

    Raises:
        UsageError: it holds something else.
    """
    require_directory(directory, "artifact")
    manifest = glance(directory / "manifest.json", LARGEST_MANIFEST)
    target = manifest.get("format")
    if isinstance(target, str) and "artifact" in manifest and target not in exports:
        raise UsageError(f"{directory} is an export for {shown(target)}; give the artifact that it was made of")
    if isinstance(target, str) and "model_free" in manifest and target not in exports:
        raise UsageError(
            f"{directory} was made without the model, as {shown(target)}; load it with "
            f"{'llama.cpp' if target == 'gguf' else 'transformers or vLLM'}"
        )
    if not (directory / "manifest.json").is_file():
        raise no_artifact(directory)


def no_artifact(directory: Path, why: str = "") -> UsageError:
    """Return the error for a directory that is no artifact, and perhaps a model."""
    if not why and (directory / "config.json").is_file():
        why = "; quantize it first"
    return UsageError(f"{directory} holds no manifest.json of a model, so it is no artifact of quantize-model{why}")


def require_directory(directory: Path, what: str) -> None:
    """Check that a directory exists; `what` says what should be there.

    Raises:
        UsageError: it does not.
    """
    if not directory.is_dir():
        raise UsageError(f"no such {what}: {directory}")


def find_measured(path: Path) -> Path:
    """Return what is measured: an artifact or a model's directory, or one file of weights beside its config.

    A directory whose only weights are one GGUF file stands for that file.

    Raises:
        UsageError: there is none of these, or an export that runs elsewhere.
    """
    files = sorted(path.glob("*.gguf")) if path.is_dir() and not any(path.glob("*.safetensors")) else []
    if path.is_file() or len(files) == 1:
        return find_model(*files or [path]) or path
    if not path.is_dir():
        raise UsageError(f"no such artifact or model: {path}")
    if (path / "manifest.json").is_file():
        require_artifact(path, RUN_IN_TRANSFORMERS)
    return path


def require_runnable(directory: Path) -> None:
    """Check that a directory holds a model for ONNX Runtime.

    Raises:
        UsageError: it does not exist, or holds something else.
    """
    require_directory(directory, "exported model")
    if not any(directory.glob("*.onnx")):
        raise UsageError(f"{directory} holds no .onnx file; write one with `quantize-model export --format onnx`")


def require_file(path: Path) -> None:
    """Check that a file of data exists.

    Raises:
        UsageError: it does not, or is a directory.
    """
    if path.is_dir():
        raise UsageError(f"{path} is a directory; give one file")
    if not path.is_file():
        raise UsageError(f"no such file: {path}")


def require_data(path: Path) -> None:
    """Check that calibration data exist, unless they may be a data set of the hub.

    Raises:
        UsageError: they do not.
    """
    if path.is_dir():
        data_files(path)
    elif not is_data_set(str(path)):
        require_file(path)


def data_files(directory: Path) -> list[Path]:
    """Return the files of a data set as `datasets` writes it, those of its part for training if it has one.

    Raises:
        UsageError: there are none, or one is a link out of the directory.
    """
    files = [path for path in sorted(directory.rglob("*")) if path.suffix in FILES_OF_DATA_SETS]
    files = [path for path in files if not path.name.startswith("cache-")]  # what `datasets` has computed from others
    files = [path for path in files if "train" in str(path.relative_to(directory))] or files
    if not files:
        raise UsageError(
            f"{directory} holds no {' and no '.join(FILES_OF_DATA_SETS)} files; give a directory of `datasets`, or "
            "one file"
        )
    for path in files:
        if not path.is_file() or not path.resolve().is_relative_to(directory.resolve()):
            raise UsageError(f"{path} is a link out of the directory; put the file itself there")
    return files


def is_data_set(name: str) -> bool:
    """Return whether a name is that of a data set on the hub, and not of a file that is missing here."""
    path = Path(name)
    return bool(DATA_SET.fullmatch(name)) and not path.exists() and not path.parent.is_dir()
