"""An exported model as a directory that exists whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from quantize.artifact.load import check_hashes
from quantize.artifact.writer import ArtifactWriter, sha256
from quantize.checkpoint.checkpoint import side_files
from quantize.errors import UsageError
from quantize.export.compressed_tensors.export import export_compressed_tensors
from quantize.export.onnx.onnx_directory import export_onnx_directory


def export_artifact(
    directory: Path,
    target: str,
    output: Path,
    qdq: bool = False,
    calibration: Path | None = None,
    hybrid: bool = False,
) -> dict[str, Any]:
    """Write an artifact for another runtime.

    Args:
        directory: an artifact, unchanged since it was written.
        target: `onnx` or `compressed-tensors`.
        output: new directory: what the target needs, tokenizer and other side files, `manifest.json` with the parity
            figures, and for `onnx` what products run in.
        qdq: for `onnx`: in standard operators only.
        hybrid: for `onnx`: W4A8 weights of language models in 4 and in 8 bits, for three times the memory; prompts
            run faster.
        calibration: for NVFP4 as `compressed-tensors`: data for ranges of activations; None takes the bundled prose.

    Returns:
        Parity: relative differences between the exported and the quantized model on two different inputs.

    Raises:
        UsageError: no artifact, the output exists, or the target cannot express what the artifact does.
        QuantizeError: damaged artifact, or the export computes something else.
    """
    check_hashes(directory)
    said: dict[str, Any] = {}
    with ArtifactWriter(output) as writer:
        if target == "onnx":
            if calibration is not None:
                raise UsageError("ONNX Runtime takes ranges of activations as they come; leave --calibration out")
            parity: dict[str, Any] = dict(export_onnx_directory(directory, writer, qdq, hybrid))
            config = json.loads((writer.directory / "ort_config.json").read_text())
            said = {name: products for name, products in config.items() if name.startswith("precisions")}
        else:
            if qdq or hybrid:
                raise UsageError(f"--{'qdq' if qdq else 'hybrid'} is a form of ONNX files; leave it out")
            parity = export_compressed_tensors(directory, writer, calibration)
        for path in side_files(directory):
            writer.write(path, (directory / path).read_bytes())
        writer.commit({"format": target, "parity": parity, "artifact": sha256(directory / "manifest.json")} | said)
    return parity
