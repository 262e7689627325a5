"""A checkpoint is rounded file by file, some rows at a time, and written as compressed-tensors."""

from __future__ import annotations

import contextlib
import functools
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from quantize.artifact.writer import as_json
from quantize.checkpoint.opening import open_files
from quantize.checkpoint.remote_shards import RemoteShards, check_low_disk
from quantize.export.compressed_tensors.experts import expert_targets
from quantize.export.compressed_tensors.export import serve_command
from quantize.export.compressed_tensors.format import NAME, quantization_config
from quantize.export.compressed_tensors.model_free.experts import WEIGHT
from quantize.export.compressed_tensors.model_free.files import write_file
from quantize.export.compressed_tensors.model_free.plan import ModelFreePlan, plan_without_model, recipe_without_model
from quantize.pipeline.context import running
from quantize.pipeline.distributed import SingleProcess
from quantize.pipeline.fingerprint import sources_hash, versions
from quantize.pipeline.progress import track
from quantize.pipeline.resume.work_dir import ResumableWriter, remote_shards
from quantize.scheme.scheme import Scheme


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
            f"{self.manifest['float_bytes']:,}, as {NAME}"
        )


def quantize_model_free(
    model: str | Path,
    *,
    output_dir: str | Path,
    scheme: str | None = None,
    recipe: str | Path | Mapping[str, Any] | None = None,
    group_size: int | None = None,
    ignore: tuple[str, ...] = (),
    requantize: bool = False,
    low_disk: bool = False,
    resume: bool = False,
    console: Console | None = None,
) -> ModelFreeResult:
    """Round the weights of a checkpoint one by one, without the model's code, into a checkpoint of compressed-tensors.

    Norms, embeddings, heads and what chooses experts stay as they are. If the process is killed, the same call with
    `resume` goes on after the last finished file.

    Args:
        model: a directory, one file of weights beside its config, or a hub id.
        output_dir: the directory of the result, which must not exist.
        scheme, recipe, group_size, ignore, requantize, low_disk: as in `quantize_model`; weights are rounded to
            nearest, with a search for scales.
        resume: whether to go on with a run that was killed.
        console: the console that shows progress; None shows nothing.

    Raises:
        UsageError: the call, the recipe or a path is wrong, or the recipe needs the model.
        QuantizeError: the files are damaged, or the disk is full.
    """
    changes = Path(recipe) if isinstance(recipe, str) else recipe
    chosen = recipe_without_model(
        scheme, changes, group_size=group_size, ignore=tuple(ignore), requantize=requantize or None
    )
    check_low_disk(model, low_disk)
    output = Path(output_dir)
    with (
        ResumableWriter(output, resume) as writer,
        remote_shards(str(model), output, SingleProcess()) if low_disk else contextlib.nullcontext(model) as source,
    ):
        plan = plan_without_model(open_files(source), chosen)
        journal = writer.begin(fingerprint(plan), SingleProcess())
        for note in plan.notes if console is not None else ():
            console.print(note, soft_wrap=True, markup=False)  # type: ignore[union-attr]
        kept = list[str]()
        for file, names in track(list(plan.shards().items()), "quantizing", lambda item: item[0], console):
            with running(file):
                write = functools.partial(write_file, plan, writer, file, names)
                done = journal.cached(file, write, torch.device("cpu"))
            writer.weight_map |= dict.fromkeys(done["tensors"], file)
            writer.hashes[file] = done["sha256"]
            kept += done["kept"]
        manifest = finish(plan, writer, kept)
        if console is not None and isinstance(source, RemoteShards):
            console.print(source.summary(), soft_wrap=True, markup=False)
    if console is not None:
        console.print(f"to serve it: {serve_command(writer.output, plan.schemes)}", soft_wrap=True, markup=False)
    return ModelFreeResult(output, manifest)


def fingerprint(plan: ModelFreePlan) -> dict[str, dict[str, str]]:
    """Return what the result depends on; of the model's files size and time, as reading them takes as long as a run."""
    seen = plan.checkpoint.seen
    return {
        "model": {path.name: seen.remote.get(path, str(stamp)) for path, stamp in sorted(seen.stamps.items())},
        "recipe": {name: str(value) for name, value in plan.recipe.model_dump(mode="json").items()},
        "code": {**versions(), "sources": sources_hash()},
    }


def finish(plan: ModelFreePlan, writer: ResumableWriter, kept: list[str]) -> dict[str, Any]:
    """Write the config, the index and the other files, and commit; return the manifest."""
    checkpoint, directory = plan.checkpoint, plan.checkpoint.directory
    assert directory is not None
    stacks = [x for linears in plan.linears.values() for x in linears if x.expert is not None]
    settings = quantization_config(with_patterns(plan.schemes, {x.path for x in stacks}), modules_in_float(plan))
    writer.write("config.json", as_json({**checkpoint.config, "quantization_config": settings}))
    writer.write("recipe.toml", plan.recipe.to_toml())
    writer.write_index()
    for path in checkpoint.side_files:
        writer.write(path.relative_to(directory), checkpoint.seen.read(path))
    checkpoint.seen.require_all_same()
    return writer.commit({
        "format": NAME,
        "model_free": True,
        "scheme": plan.recipe.scheme,
        "schemes": dict(Counter(scheme.label for scheme in plan.schemes.values())),
        "versions": versions(),
        "float_bytes": checkpoint.stored_bytes(),
        "bytes": sum((writer.directory / file).stat().st_size for file in plan.shards()),
        "kept_grids": kept,
        "coverage": dict(sorted((dict(plan.reasons) | dict.fromkeys(plan.linears, "quantized")).items())),
    })  # fmt: skip


def with_patterns(schemes: Mapping[str, Scheme], experts: set[str]) -> dict[str, Scheme]:
    """Return the schemes by path, with one pattern for all experts of a stack."""
    return {
        place: scheme
        for path, scheme in schemes.items()
        for place in (expert_targets([path]) if path in experts else [path])
    }


def modules_in_float(plan: ModelFreePlan) -> list[str]:
    """Return the modules whose weights of two or more axes stay in floating point."""
    names = (name for name, shape in plan.shapes.items() if len(shape) > 1 and name not in plan.linears)
    return [name.removesuffix(WEIGHT) for name in names if name.endswith(WEIGHT)]
