"""The page of a finished artifact is made again."""

from __future__ import annotations

import hashlib
from pathlib import Path

from quantize.artifact.load import read_manifest
from quantize.artifact.report.page import PAGE, page
from quantize.artifact.writer import translate_disk_errors
from quantize.errors import UsageError
from quantize.recipe.recipe import load_recipe


def write_page(directory: Path, output: Path | None = None) -> Path:
    """Write the page of an artifact, and return where it is.

    Args:
        directory: the artifact.
        output: the file; None takes the place that the page has in the artifact.

    Raises:
        UsageError: the directory is no artifact, or its page would become another one than its manifest lists.
    """
    manifest, recipe = read_manifest(directory), directory / "recipe.toml"
    if manifest.get("model_free"):
        raise UsageError(
            f"{directory} was rounded without the model, so that nothing was measured that a page could show"
        )
    if not recipe.is_file():
        raise UsageError(f"{directory} holds no recipe.toml, which belongs to an artifact; fetch the artifact anew")
    content = page(manifest, load_recipe(None, recipe).to_toml()).encode()
    if output is None and manifest["files"].get(PAGE) != hashlib.sha256(content).hexdigest():
        raise UsageError(
            f"{directory} was made by another version, whose page has other bytes; give -o FILE for a page elsewhere"
        )
    path = output or directory / PAGE
    with translate_disk_errors(path):
        path.unlink(missing_ok=True)  # never write through a link
        path.write_bytes(content)
    return path
