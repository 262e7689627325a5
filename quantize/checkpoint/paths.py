"""Paths that a person gives are checked before anything slow is imported."""

from __future__ import annotations

import re
from pathlib import Path

from quantize.errors import UsageError

HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
DATA_SET = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(:[\w.-]+){0,2}")  # owner/name, a configuration and a split
FILES_OF_MODELS = {
    ".gguf": "is a GGUF file, and its weights are rounded already; give the directory of the floating-point model",
    ".onnx": "is an exported model; give the directory of the model that it was made of",
    ".safetensors": "is one file of a model; give the directory with its config.json",
}


def find_directory(model: str | Path) -> Path | None:
    """Return the directory of a model, or None for what may be a hub id.

    Raises:
        UsageError: the model is neither.
    """
    path = Path(model)
    if path.is_dir():
        require_config(path)
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
    if not path.is_file():
        raise UsageError(f"{directory} holds no config.json, so it is no model directory")
    return path


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


def is_data_set(name: str) -> bool:
    """Return whether a name is that of a data set on the hub, and not of a file that is missing here."""
    path = Path(name)
    return bool(DATA_SET.fullmatch(name)) and not path.exists() and not path.parent.is_dir()


def require_new(output: Path) -> None:
    """Check that an output does not exist.

    Raises:
        UsageError: it does; nothing is ever overwritten.
    """
    if output.exists() or output.is_symlink():
        raise UsageError(f"{output} exists already; give a new --output-dir")
