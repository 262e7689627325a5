"""An exported model as a directory that exists whole or not at all."""

from __future__ import annotations

from pathlib import Path

from quantize.artifact import ArtifactWriter, as_json, check_hashes, load, read_manifest, sha256
from quantize.checkpoint import side_files
from quantize.errors import UsageError
from quantize.export.onnx import SESSION_CONFIG, export_onnx


def export_artifact(directory: Path, target: str, output: Path) -> dict[str, float]:
    """Write an artifact for another runtime.

    Args:
        directory: an artifact, unchanged since it was written.
        target: `onnx`.
        output: new directory: `model.onnx`, tokenizer and other side files, `ort_config.json` with the session
            options that make the file exact on every CPU, `manifest.json` with the parity figures.

    Returns:
        Largest relative differences between the exported and the quantized model on two different inputs.

    Raises:
        UsageError: no artifact, the output exists, or the scheme cannot be expressed.
        QuantizeError: damaged artifact, or the export computes something else.
    """
    check_hashes(directory)
    if read_manifest(directory)["quantization"].get("prefix"):
        raise UsageError(f"{directory} has a prefix, which ONNX cannot run; quantize without `prefix` in the recipe")
    with ArtifactWriter(output) as writer:
        parity = export_onnx(load(directory), writer.directory)
        for path in [*side_files(directory), Path("config.json")]:
            writer.write(path, (directory / path).read_bytes())
        writer.write("ort_config.json", as_json({"session_config_entries": SESSION_CONFIG}))
        writer.commit({"format": target, "parity": parity, "artifact": sha256(directory / "manifest.json")})
    return parity
