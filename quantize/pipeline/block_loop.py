"""The blocks of a run go by: one is read, one is at work, and one is written, and the journal notes what is on disk.

A block that fills the device is tried again with less of it: with half as many calibration rows at a time, then with
all calibration activations in the machine's memory.
"""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from quantize.artifact.writer import ArtifactWriter
from quantize.checkpoint.files_seen import sha256
from quantize.errors import QuantizeError
from quantize.pipeline.context import DeviceFullError, RunContext, running
from quantize.pipeline.overlap import WriteBehind
from quantize.pipeline.placement import Placement
from quantize.pipeline.progress import track
from quantize.pipeline.resume.journal import Journal
from quantize.pipeline.sequential import SequentialPipeline
from quantize.pipeline.streams import Arriving


def run_blocks(
    make: Callable[[RunContext], SequentialPipeline],
    names: Sequence[str],
    writer: ArtifactWriter | None,
    context: RunContext,
    foretold: Callable[[Placement], str],
) -> SequentialPipeline:
    """Take a run through its blocks, from the last one in the journal on, and return the state behind them.

    Args:
        make: makes the state in front of the first block.
        names: the file of each block.
        writer: an open writer; None on ranks other than rank 0.
        context: the context of the run.
        foretold: says in lines what the device holds.

    Raises:
        QuantizeError: a block failed, or does not fit into the device's memory whatever gives way.
    """
    tried = set[str]()
    while True:
        with running("the model"):
            blocks = make(context)
        try:
            go_on(blocks, names, writer, context)
            return blocks
        except DeviceFullError as error:
            if context.journal is None or context.ranks.count > 1:
                raise
            halves = blocks.calibration.halves and error.where not in tried
            context = replace(context, placement=smaller(context.placement, error, halves, foretold))
            full = error.where
            tried.add(full)
            gives = "fewer rows run together" if halves else "calibration activations leave it"
        del blocks
        gc.collect()  # what the error held
        if context.device.type == "cuda":
            torch.cuda.empty_cache()
        if context.console is not None:
            context.console.print(
                f"{full} does not fit into the device's memory: {gives}", soft_wrap=True, markup=False
            )


def smaller(
    placement: Placement, error: DeviceFullError, halves: bool, foretold: Callable[[Placement], str]
) -> Placement:
    """Return what holds less on the device: half the rows together, or else no activations beside the batch that runs.

    Raises:
        QuantizeError: nothing is left that could give way.
    """
    if halves:
        return replace(placement, halved=(*placement.halved, error.where))
    if placement.activation_bytes == 0:
        raise QuantizeError(
            f"{error.where} does not fit into the device's memory, though few rows run together and activations lie in "
            "the machine's memory; give a smaller --seqlen, or --device cpu; what the device was foretold to hold:\n"
            f"{foretold(placement)}"
        ) from error
    return replace(placement, activation_bytes=0)


def go_on(blocks: SequentialPipeline, names: Sequence[str], writer: ArtifactWriter | None, context: RunContext) -> None:
    """Go through the blocks behind the last one in the journal."""
    console, journal, segments = context.console, context.journal, blocks.program.segments
    done = journal.load_last_block(blocks, writer) if journal else 0
    if done and console is not None:
        console.print(f"going on behind block {done} of {len(segments)}, {segments[done - 1].name}")
    shown = track(segments[done:], "quantizing", lambda s: s.name, console)
    with WriteBehind() as behind, closing(blocks.arriving(segments[done:])) as arriving:
        for number, segment in enumerate(shown, done + 1):
            with running(segment.name):
                name = names[number - 1]
                experts = Path(writer.directory if writer else "") / f"{Path(name).stem}-experts.safetensors"
                tensors, filed = blocks.process(segment, next(arriving), experts)
            border = journal.store_block(number, blocks) if journal else None
            if writer:
                behind.do(functools.partial(write_block, writer, name, tensors, filed, journal, border))
            del tensors


def write_block(
    writer: ArtifactWriter,
    name: str,
    tensors: dict[str, Arriving],
    filed: dict[str, str],
    journal: Journal | None,
    border: Path | None,
) -> None:
    """Write a block, wait until it is on disk, and let the journal note it."""
    writer.weight_map |= filed
    writer.hashes |= {file: sha256(writer.directory / file) for file in dict.fromkeys(filed.values())}
    writer.add(name, waited_for(tensors))
    if journal is not None and border is not None:
        journal.note(border, writer)


def waited_for(tensors: dict[str, Arriving]) -> dict[str, Tensor]:
    """Return tensors once they have arrived, and let go of what they came from one by one."""
    return {name: tensors.pop(name)() for name in list(tensors)}
