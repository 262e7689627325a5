"""An exported model is a directory that exists complete or not at all."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from rich.console import Console

from quantize.artifact.load import check_hashes, checked_on_meta, load, read_manifest
from quantize.artifact.writer import ArtifactWriter
from quantize.checkpoint.files_seen import sha256
from quantize.checkpoint.opening import side_files
from quantize.errors import UsageError
from quantize.export import EXPORTERS
from quantize.export.outline import Outline


def export_artifact(
    directory: str | os.PathLike[str],
    target: str,
    output: str | Path,
    console: Console | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Export an artifact for another runtime.

    Args:
        directory: an artifact or its path, unchanged since it was written.
        target: a name in `EXPORTERS`.
        output: a new directory for the target's files, tokenizer and other side files, and `manifest.json` with what
            the target reports, the parity figures first.
        console: the console that shows progress; None shows nothing.
        options: the target's options, by name.

    Returns:
        How far the exported model is from the quantized one, as the target measures it.

    Raises:
        UsageError: the directory is no artifact, the output exists, the target has no such option, or it cannot express
            what the artifact does.
        QuantizeError: the artifact is damaged, or the exported model computes something else.
    """
    directory, output = Path(directory), Path(output)
    exporter = EXPORTERS.find(target, options)
    check_hashes(directory)
    if read_manifest(directory).get("model_free"):
        raise UsageError(
            f"{directory} was rounded without the model, so it holds no outputs to compare an export with; round the "
            "model again with --model-free and the --format that you want"
        )
    with ArtifactWriter(output) as writer:
        exporter.check(Outline.read(directory))
        load(directory, read=checked_on_meta)  # every tensor has its place, and its numbers are finite
        for path in side_files(directory):
            writer.write(path, (directory / path).read_bytes())
        said = exporter.export(directory, writer, console, **options)
        writer.commit({"format": target, **said, "artifact": sha256(directory / "manifest.json")})
    parity: dict[str, Any] = said["parity"]
    return parity
