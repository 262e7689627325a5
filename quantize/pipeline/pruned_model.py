"""A float model without some of its experts is written as transformers writes it, for any other tool."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from rich.console import Console
from torch import Tensor, nn
from transformers import PreTrainedModel

from quantize.artifact.writer import ArtifactWriter, as_json
from quantize.calibration.sources import Calibration
from quantize.checkpoint.key_mapping import as_stored
from quantize.checkpoint.tied_weights import TiedWeights
from quantize.pipeline.context import RunContext
from quantize.pipeline.prepare import Prepared, prepare
from quantize.pipeline.progress import track
from quantize.pipeline.prune import prune_experts, told
from quantize.recipe.recipe import load_recipe

RECORD = "pruning.json"


@dataclass(frozen=True)
class PrunedModel:
    """A float model without some of its experts.

    Attributes:
        directory: the new directory, which `quantize_model` and transformers take.
        record: what `pruning.json` says: which experts stay, and what that costs.
    """

    directory: Path
    record: dict[str, Any]

    def __fspath__(self) -> str:
        return str(self.directory)

    def summary(self) -> str:
        """Describe what was dropped and what that costs."""
        return f"{self.directory}: {told(self.record)}"


def prune_model(
    model: str | Path | nn.Module,
    *,
    output_dir: str | Path,
    ratio: float,
    calibration: Calibration | None = None,
    tokenizer: Any = None,
    nsamples: int | None = None,
    seqlen: int | None = None,
    console: Console | None = None,
) -> PrunedModel:
    """Drop the experts that add the least to their layer's output, and write the float model that is left.

    Args:
        model: a directory, a hub id, or a module of transformers.
        output_dir: the new directory, with weights in the dtypes in which they are stored.
        ratio: the part of the experts of each layer that is dropped, rounded down to whole experts.
        calibration, tokenizer, nsamples, seqlen: as in `quantize_model`.
        console: the console that shows progress; None shows nothing.

    Raises:
        UsageError: the call or a path is wrong, or the ratio does not fit the model.
        QuantizeError: the run failed; nothing is left behind.
    """
    changes = {"passes": [], "quantizer": {"name": "rtn"}, "prune": {"ratio": ratio}}
    recipe = load_recipe("W4A16", changes, group_size=0, nsamples=nsamples, seqlen=seqlen)
    with ArtifactWriter(Path(output_dir)) as writer:
        context = RunContext(recipe.seed, scratch=writer.directory, console=console)
        prepared = prepare(model, recipe, calibration, tokenizer=tokenizer)
        prepared = prune_experts(prepared, recipe, context)
        write_pruned(prepared, writer, console)
    return PrunedModel(Path(output_dir), dict(prepared.pruning))


def write_pruned(prepared: Prepared, writer: ArtifactWriter, console: Console | None) -> None:
    """Write the weights that are left, layer by layer, with config and side files, and let the directory appear."""
    checkpoint, segments = prepared.checkpoint, prepared.program.segments
    skeleton, count = cast(PreTrainedModel, checkpoint.skeleton()), len(segments) + 1
    names = [*(segment.name for segment in segments), "the rest"]
    parts = parts_of(prepared)
    for number, _ in enumerate(track(names, "writing", str, console), 1):
        writer.add(f"model-{number:05}-of-{count:05}.safetensors", as_stored(skeleton, next(parts)))
    writer.write("config.json", as_json(checkpoint.config))
    writer.write(RECORD, as_json(dict(prepared.pruning)))
    writer.write_index()
    for path in checkpoint.side_files:
        writer.write(path.relative_to(checkpoint.directory or path), checkpoint.seen.read(path))
    if prepared.tokenizer is not None:
        prepared.tokenizer.save_pretrained(writer.directory)
    checkpoint.seen.require_all_same()
    writer.publish()


def parts_of(prepared: Prepared) -> Iterator[dict[str, Tensor]]:
    """Yield the tensors that each file of weights holds; of tied parameters one is stored."""
    checkpoint, program = prepared.checkpoint, prepared.program
    ties, first = TiedWeights(program.ties), program.first_readers
    for segment in program.segments:
        names = [name for name in segment.parameters if first[name] is segment]
        yield ties.deduplicate({name: checkpoint.tensor(name) for name in names})
    unread = {name: checkpoint.tensor(name) for name in program.parameters.values() if name not in first}
    yield ties.deduplicate(unread) | checkpoint.buffers()
