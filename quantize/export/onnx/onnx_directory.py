"""Other files are written beside an exported ONNX file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from quantize.artifact.load import load
from quantize.artifact.writer import ArtifactWriter, as_json
from quantize.export.onnx.decoder import Decoder
from quantize.export.onnx.encoder_decoder import EncoderDecoder
from quantize.export.onnx.export import export_onnx, interface_of
from quantize.export.onnx.genai import OF_SOUND, genai_config, genai_config_of_sound


def export_onnx_directory(
    directory: Path, writer: ArtifactWriter, qdq: bool = False, hybrid: bool = False
) -> dict[str, Any]:
    """Write an artifact's `model.onnx`, `config.json` and `ort_config.json`, and `genai_config.json` if it is known.

    Arguments and errors are those of `export_onnx`.

    Returns:
        `parity`, the result of `export_onnx`, and the precisions in which the products run.
    """
    model = load(directory)
    parity = export_onnx(model, writer.directory, qdq, hybrid)
    writer.write("config.json", (directory / "config.json").read_bytes())
    interface = interface_of(model)
    config = json.loads((writer.directory / "ort_config.json").read_text())
    entries = config["session_config_entries"]
    if isinstance(interface, Decoder):
        writer.write("genai_config.json", as_json(genai_config(interface, entries)))
    if isinstance(interface, EncoderDecoder) and interface.model.config.model_type in OF_SOUND:
        writer.write("genai_config.json", as_json(genai_config_of_sound(interface, entries)))
    return {"parity": parity} | {name: found for name, found in config.items() if name.startswith("precisions")}
