"""An exported file is opened in ONNX Runtime."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnxruntime

from quantize.errors import QuantizeError, UsageError, reason
from quantize.export.onnx.parity import open_session
from quantize.export.onnx.runtime.saturation import has_exact_int8_gemm


def session_of(directory: Path, file: str = "model.onnx") -> onnxruntime.InferenceSession:
    """Open a file of a directory with the session options that are stored beside it.

    Raises:
        UsageError: there is no such file.
        QuantizeError: ONNX Runtime cannot load it.
    """
    path = directory / file
    if not path.is_file():
        raise UsageError(f"{directory} holds no {file}; write one with `quantize-model export --format onnx`")
    config = read(directory / "ort_config.json")
    entries = config.get("session_config_entries", {}) | (config.get("with_vnni", {}) if has_exact_int8_gemm() else {})
    try:
        return open_session(path, entries)
    except Exception as error:  # of onnxruntime's own classes
        raise QuantizeError(f"ONNX Runtime cannot load {path}: {reason(error)}") from None


def read(path: Path) -> dict[str, Any]:
    """Read a JSON object, which is {} if there is no such file."""
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise QuantizeError(f"{path} is no JSON: {error}") from None
    return dict(found)
