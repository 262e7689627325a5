"""Paths that a person gives are checked before anything slow is imported."""

from __future__ import annotations

import json
import re
from pathlib import Path

from quantize.errors import UsageError, shown

ADAPTER = "adapter_config.json"
LARGEST_ADAPTER_CONFIG = 1 << 20  # bytes
HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
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
    try:
        with path.open("rb") as file:
            found = json.loads(file.read(LARGEST_ADAPTER_CONFIG))["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return ""
    return f" of {shown(found)}" if isinstance(found, str) and found else ""


def require_directory(directory: Path, what: str) -> None:
    """Check that a directory exists; `what` says what should be there.

    Raises:
        UsageError: it does not.
    """
    if not directory.is_dir():
        raise UsageError(f"no such {what}: {directory}")


def require_file(path: Path) -> None:
    """Check that a file of data exists.

    Raises:
        UsageError: it does not, or is a directory.
    """
    if path.is_dir():
        raise UsageError(f"{path} is a directory; give one file")
    if not path.is_file():
        raise UsageError(f"no such file: {path}")


def require_new(output: Path) -> None:
    """Check that an output does not exist.

    Raises:
        UsageError: it does; nothing is ever overwritten.
    """
    if output.exists() or output.is_symlink():
        raise UsageError(f"{output} exists already; give a new --output-dir")
