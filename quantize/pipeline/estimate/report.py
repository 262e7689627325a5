"""A dry run reports what would be done, and what it would take."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from rich.console import Console

from quantize.checkpoint.remote_shards import SHARDS, RemoteShards
from quantize.pipeline.estimate.memory import MemoryEstimate
from quantize.pipeline.estimate.peak_memory import peak_memory
from quantize.pipeline.estimate.time import measure_time
from quantize.pipeline.fold_check import checks_folds
from quantize.pipeline.prepare import Prepared


def preflight(prepared: Prepared) -> MemoryEstimate:
    """Estimate a prepared run from the headers of the files alone."""
    dtypes = {name: prepared.checkpoint.dtype_of(name) for name in prepared.program.parameters.values()}
    return MemoryEstimate(
        prepared.checkpoint, prepared.program, prepared.plan, prepared.samples, dtypes, prepared.held_out
    )


def shard_names(prepared: Prepared) -> list[str]:
    """Return the name of each block's file, then that of the remaining tensors; no number is left out.

    A file that is foreseen to be empty has a name of its own, for it is only foreseen.
    """
    holds = [bool(tensors) for tensors in preflight(prepared).tensors]
    counts = list(itertools.accumulate(holds))
    return [
        f"model-{count:05}-of-{counts[-1]:05}.safetensors" if any_ else f"model-more-{number:05}.safetensors"
        for number, (count, any_) in enumerate(zip(counts, holds, strict=True))
    ]


def estimates(found: MemoryEstimate, opened: float, console: Console | None = None) -> Iterator[str]:
    """Yield the model's size, memory, disk and time as lines.

    `opened` is the time in s that opening and exporting the model took.
    """
    held, more = peak_memory(), found.memory_bytes()
    size = found.checkpoint.stored_bytes() if found.checkpoint.encoded else found.float_bytes()
    yield f"model: {found.parameter_count():,} parameters in {human(size)}"
    yield f"memory: {human(held + more)} at its peak, {human(held)} of it held now by this process and its libraries"
    yield f"disk: {human(found.artifact_bytes())} for the artifact, {human(found.journal_bytes())} beside it meanwhile"
    if (remote := found.checkpoint.remote) is not None:
        yield f"disk: {human(remote.most_bytes)} more at most for files of the model, {SHARDS} at a time"
        yield f"download: {downloads(found, remote)}"
    measured = measure_time(found, opened, console) if found.checkpoint.has_weights else "not measured without weights"
    yield f"time: {measured}"


def downloads(found: MemoryEstimate, remote: RemoteShards) -> str:
    """Say how often the files of a model on the hub are fetched, and how many bytes that takes."""
    reasons, total = readings(found), sum(remote.sizes.values())
    if len(remote.sizes) <= SHARDS or len(reasons) == 1:
        return f"{human(total)}, each file once"
    return (
        f"{human(len(reasons) * total)} at most, each of {len(remote.sizes)} files up to {len(reasons)} times, as the "
        f"whole model is read for {', for '.join(reasons[:-1])} and for {reasons[-1]}; passes = [] reads it once"
    )


def readings(found: MemoryEstimate) -> list[str]:
    """Return what the whole model is read for, one reading after the other; the last one is what is written."""
    plan, recipe = found.plan, found.plan.recipe
    reasons = {
        "the choice of experts": recipe.prune is not None,
        "the choice between grids and transforms": plan.alternative is not None and bool(found.held_out.rows),
        "the search for a prefix": recipe.prefix is not None and recipe.prefix.search,
        "a check of folds and rotations": checks_folds(plan),
        "statistics of all blocks": any(step.surveyed for step in plan.steps),
    }
    return [*(reason for reason, holds in reasons.items() if holds), "the blocks"]


def human(size: float) -> str:
    """Return a number of bytes in the unit that suits it, such as `12.3 MB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"
