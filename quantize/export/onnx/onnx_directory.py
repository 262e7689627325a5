"""Other files are written beside an exported ONNX file."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from torch import Tensor

from quantize.artifact.load import load
from quantize.artifact.writer import ArtifactWriter, as_json
from quantize.calibration.data import BUNDLED, read_samples
from quantize.checkpoint.tokenizer import load_tokenize
from quantize.errors import QuantizeError
from quantize.export.hf_checkpoint import probe_inputs
from quantize.export.onnx.decoder import Decoder
from quantize.export.onnx.encoder_decoder import EncoderDecoder
from quantize.export.onnx.export import export_onnx, interface_of
from quantize.export.onnx.genai import OF_SOUND, genai_config, genai_config_of_sound
from quantize.export.onnx.interface import vocabulary_of
from quantize.graph.inputs import example_inputs

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WINDOWS, WINDOW = 4, 128  # windows of prose on which a language model is compared, and the tokens of each


def export_onnx_directory(
    directory: Path, writer: ArtifactWriter, console: Console | None = None, qdq: bool = False, hybrid: bool = False
) -> dict[str, Any]:
    """Write an artifact's `model.onnx`, `config.json` and `ort_config.json`, and `genai_config.json` if it is known.

    Arguments and errors are those of `export_onnx`.

    Returns:
        `parity`, the result of `export_onnx`, and the precisions in which the products run.
    """
    model = load(directory, engine="reference")
    samples = real_samples(directory, model)
    parity = export_onnx(model, writer.directory, qdq, hybrid, samples=samples, console=console)
    writer.write("config.json", (directory / "config.json").read_bytes())
    interface = interface_of(model)
    config = json.loads((writer.directory / "ort_config.json").read_text())
    entries = config["session_config_entries"]
    if isinstance(interface, Decoder):
        writer.write("genai_config.json", as_json(genai_config(interface, entries)))
    if isinstance(interface, EncoderDecoder) and interface.model.config.model_type in OF_SOUND:
        writer.write("genai_config.json", as_json(genai_config_of_sound(interface, entries)))
    return {"parity": parity} | {name: found for name, found in config.items() if name.startswith("precisions")}


def real_samples(directory: Path, model: PreTrainedModel) -> list[dict[str, Tensor]]:
    """Return windows of the bundled prose [1, tokens]; if the model cannot read them, its first probe.

    The first probe is the start of a calibration sample.
    """
    if list(example_inputs(model)) == ["input_ids"]:
        length = min(WINDOW, (getattr(model.config, "max_position_embeddings", None) or 2 * WINDOW) // 2)
        with contextlib.suppress(QuantizeError):  # no tokenizer, that of another model, or one of few words
            prose = read_samples(BUNDLED, length, WINDOWS, load_tokenize(directory), vocabulary_of(model))
            return [{name: ids[None] for name, ids in row.items()} for row in prose.rows]
    return probe_inputs(directory)[:1]
