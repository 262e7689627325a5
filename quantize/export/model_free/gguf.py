"""Rounded files become one GGUF file, a tensor at a time, whose weights are read back and compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console

from quantize.artifact.writer import ArtifactWriter, translate_disk_errors
from quantize.checkpoint.sources.gguf import header_of, read_floats
from quantize.checkpoint.tensor_files import index_tensors
from quantize.errors import UsageError
from quantize.export import EXPORTERS
from quantize.export.hf_checkpoint import stored_linear
from quantize.export.model_free.forms import ARTIFACT, GGUF
from quantize.export.model_free.plan import ModelFreePlan
from quantize.export.model_free.results import artifact_settings, record, write_beside
from quantize.export.outline import Outline


def outline_of(plan: ModelFreePlan) -> Outline:
    """Return the outline of what a plan makes.

    Raises:
        UsageError: the model has no class, or there is none for GGUF, or GGUF has no place for it.
    """
    model, checkpoint = plan.opened.model, plan.checkpoint
    if model is None:
        raise UsageError(
            "GGUF's names and metadata follow from the model's class, which transformers does not have for "
            f"{checkpoint.directory}; give --format {ARTIFACT}, or leave --format out"
        )
    outline = Outline(checkpoint.config, artifact_settings(plan), model, checkpoint.directory)
    EXPORTERS.find(GGUF, {}).check(outline)
    return outline


def finish_gguf(
    plan: ModelFreePlan, writer: ArtifactWriter, rounded: Path, kept: list[str], console: Console | None
) -> dict[str, Any]:
    """Write a GGUF file of rounded files, compare the two, and commit; return the manifest.

    Raises:
        QuantizeError: the file holds other weights than the rounded ones.
    """
    from quantize.export.gguf.export import FILE, write_gguf
    from quantize.export.gguf.tensors import gguf_tensors

    outline = outline_of(plan)
    path, config, tokenizer = writer.directory / FILE, outline.model_config(), plan.checkpoint.directory
    assert tokenizer is not None
    with translate_disk_errors(writer.output):
        types = write_gguf(path, gguf_tensors(rounded, outline, console), config, tokenizer)
    found = {"types": types, "parity": {"steps": largest_step(path, rounded, outline)}}
    write_beside(plan, writer, plan.checkpoint.config)
    return writer.commit({"format": GGUF, **record(plan, writer, kept), **found})


def largest_step(path: Path, rounded: Path, outline: Outline) -> float:
    """Return how many steps a file's weights are from the rounded ones at most, one weight in memory at a time.

    Raises:
        QuantizeError: they are further from them than float16 scales explain.
    """
    from quantize.export.gguf.parity import check_steps, in_model_order, moved
    from quantize.export.gguf.tensors import gguf_name, name_map, row_order

    config, files, places, steps = outline.model_config(), index_tensors(rounded), header_of(path).places, 0.0
    names = name_map(config)
    for module in outline.settings["modules"]:
        own = stored_linear(module, outline, files).qtensor()
        name = gguf_name(names, f"{module}.weight")
        weight, scale = read_floats(path, name), f"{name.removesuffix('.weight')}.scale"
        weight = weight * read_floats(path, scale) if scale in places else weight
        steps = max(steps, moved(in_model_order(weight, row_order(module, len(own.data), config)), own))
    check_steps(steps)
    return steps
