"""A checkpoint is rounded file by file, some rows at a time, and written in one of three forms."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from quantize.artifact.load import without_class
from quantize.artifact.writer import translate_disk_errors
from quantize.checkpoint.paths import check_low_disk
from quantize.checkpoint.remote_shards import RemoteShards
from quantize.checkpoint.untrusted_files import read_json
from quantize.errors import UsageError, shown
from quantize.export.compressed_tensors.export import serve_command
from quantize.export.compressed_tensors.format import NAME, UNPACKED, has_packed_zero_points
from quantize.export.compressed_tensors.obstacles import unserved
from quantize.export.model_free.files import write_file
from quantize.export.model_free.forms import ARTIFACT, FORMS, GGUF, Form, open_for
from quantize.export.model_free.gguf import finish_gguf, outline_of
from quantize.export.model_free.plan import ModelFreePlan, plan_without_model, recipe_without_model
from quantize.export.model_free.results import finish_artifact, finish_checkpoint
from quantize.pipeline.context import running
from quantize.pipeline.distributed import SingleProcess
from quantize.pipeline.fingerprint import sources_hash, versions
from quantize.pipeline.progress import track
from quantize.pipeline.resume.work_dir import ResumableWriter, remote_shards
from quantize.recipe.recipe import Recipe


@dataclass(frozen=True)
class ModelFreeResult:
    """A finished run without the model: the directory of the checkpoint, and what its `manifest.json` says."""

    directory: Path
    manifest: dict[str, Any]

    def record(self) -> dict[str, Any]:
        """Return what `summary` says as plain data."""
        names = ("digest", "bytes", "float_bytes", "schemes")
        return {"directory": str(self.directory), **{name: self.manifest[name] for name in names}}

    def summary(self) -> str:
        """Describe what was rounded, in a line."""
        schemes = ", ".join(f"{label} in {count} linears" for label, count in self.manifest["schemes"].items())
        return (
            f"{self.directory}: {schemes}, {self.manifest['bytes']:,} bytes where the model has "
            f"{self.manifest['float_bytes']:,}, as {self.manifest.get('format', ARTIFACT)}"
        )


def quantize_model_free(
    model: str | Path,
    *,
    output_dir: str | Path,
    scheme: str | None = None,
    recipe: str | Path | Mapping[str, Any] | None = None,
    group_size: int | None = None,
    ignore: tuple[str, ...] = (),
    format: str = NAME,
    target: str | None = None,
    requantize: bool = False,
    low_disk: bool = False,
    resume: bool = False,
    console: Console | None = None,
) -> ModelFreeResult:
    """Round the weights of a checkpoint one by one, without the model's code.

    Norms, embeddings, heads and what chooses experts stay as they are. If the process is killed, the same call with
    `resume` goes on after the last finished file.

    Args:
        model: a directory, one file of weights beside its config, or a hub id.
        output_dir: the directory of the result, which must not exist.
        format: what is written: `compressed-tensors`, `artifact` or `gguf`.
        scheme, recipe, group_size, ignore, target, requantize, low_disk: as in `quantize_model`; weights are rounded
            to nearest, with a search for scales.
        resume: whether to go on with a run that was killed.
        console: the console that shows progress; None shows nothing.

    Raises:
        UsageError: the call, the recipe or a path is wrong, or the recipe needs the model.
        QuantizeError: the files are damaged, or the disk is full.
    """
    changes, form = Path(recipe) if isinstance(recipe, str) else recipe, form_of(format)
    chosen = recipe_without_model(
        form, scheme, changes, target, group_size=group_size, ignore=tuple(ignore), requantize=requantize or None
    )
    check_low_disk(model, low_disk)
    output = Path(output_dir)
    with (
        ResumableWriter(output, resume) as writer,
        remote_shards(str(model), output, SingleProcess()) if low_disk else contextlib.nullcontext(model) as source,
    ):
        if writer.finished:
            return ModelFreeResult(output, read_json(output / "manifest.json"))
        plan = plan_for(form, source, chosen)
        journal = writer.begin(fingerprint(plan), SingleProcess())
        for note in plan.notes if console is not None else ():
            console.print(note, soft_wrap=True, markup=False)  # type: ignore[union-attr]
        rounded, kept = writer.partial / "rounded" if form.name == GGUF else writer.directory, list[str]()
        rounded.mkdir(exist_ok=True)
        for file, names in track(list(plan.shards().items()), "quantizing", lambda item: item[0], console):
            with running(file), translate_disk_errors(output):
                write = functools.partial(write_file, plan, rounded, file, names)
                done = journal.cached(file, write, torch.device("cpu"))
            writer.weight_map |= dict.fromkeys(done["tensors"], file)
            writer.hashes |= {} if form.name == GGUF else {file: done["sha256"]}
            kept += done["kept"]
        with running("the result"):
            manifest = finish(plan, writer, rounded, kept, console)
        if console is not None and isinstance(source, RemoteShards):
            console.print(source.summary(), soft_wrap=True, markup=False)
    if console is not None:
        console.print(next_step(plan, output), soft_wrap=True, markup=False)
    return ModelFreeResult(output, manifest)


def form_of(name: str) -> Form:
    """Return a form by its name.

    Raises:
        UsageError: there is none.
    """
    if name not in FORMS:
        raise UsageError(f"without the model nothing is written as {shown(name)}; give {', '.join(FORMS)}")
    return FORMS[name]


def plan_for(form: Form, source: str | Path | RemoteShards, recipe: Recipe) -> ModelFreePlan:
    """Open a model's files and plan what becomes of them.

    Raises:
        UsageError: there is no such model, the recipe does not fit it, or the form has no place for it.
    """
    plan = plan_without_model(form, open_for(form, source), recipe)
    if form.name == GGUF:
        outline_of(plan)
    return plan


def finish(
    plan: ModelFreePlan, writer: ResumableWriter, rounded: Path, kept: list[str], console: Console | None
) -> dict[str, Any]:
    """Write what stands beside the rounded files, and commit; return the manifest."""
    if plan.form.name == GGUF:
        return finish_gguf(plan, writer, rounded, kept, console)
    return (finish_artifact if plan.form.is_artifact else finish_checkpoint)(plan, writer, kept)


def next_step(plan: ModelFreePlan, output: Path) -> str:
    """Say what a person does with a result."""
    if plan.form.name == GGUF:
        return f"to run it: llama-cli -m {output / 'model.gguf'}"
    if not plan.form.is_artifact:
        why = unserved(plan.schemes.values(), [plan.schemes[x.path] for x in plan.of_stacks])
        told = f"vLLM does not serve it: {why}" if why else f"to serve it: {serve_command(output, plan.schemes)}"
        unpacked = any(map(has_packed_zero_points, plan.schemes.values()))
        return f"{told}\ntransformers loads it {UNPACKED}" if unpacked else told
    if why := without_class(output):
        return f"{why}, so quantize.load needs a module of that class as skeleton, with the names that the files have"
    return f"to load it: quantize.load('{output}')"


def fingerprint(plan: ModelFreePlan) -> dict[str, dict[str, str]]:
    """Return what the result depends on; of the model's files size and time, as reading them takes as long as a run."""
    seen = plan.checkpoint.seen
    return {
        "model": {path.name: seen.remote.get(path, str(stamp)) for path, stamp in sorted(seen.stamps.items())},
        "recipe": {
            "format": plan.form.name,
            **{name: str(value) for name, value in plan.recipe.model_dump(mode="json").items()},
        },
        "code": {**versions(), "sources": sources_hash()},
    }
