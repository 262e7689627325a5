"""What lies beside an exported ONNX file."""

from __future__ import annotations

import json
from pathlib import Path

from quantize.artifact import ArtifactWriter, as_json, load
from quantize.export.decoder import Decoder
from quantize.export.genai import genai_config
from quantize.export.onnx import export_onnx, interface_of


def export_onnx_directory(directory: Path, writer: ArtifactWriter, qdq: bool = False) -> dict[str, float]:
    """Write an artifact's `model.onnx`, `config.json`, `ort_config.json`; of a language model `genai_config.json`.

    Arguments, results and errors are those of `export_onnx`.
    """
    model = load(directory)
    parity = export_onnx(model, writer.directory, qdq)
    writer.write("config.json", (directory / "config.json").read_bytes())
    interface = interface_of(model)
    if isinstance(interface, Decoder):
        entries = json.loads((writer.directory / "ort_config.json").read_text())["session_config_entries"]
        writer.write("genai_config.json", as_json(genai_config(interface, entries)))
    return parity
