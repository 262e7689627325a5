"""A run loads, calibrates, transforms, quantizes, verifies and writes a model, block by block."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from torch import nn

from quantize.artifact.load import load, read_manifest
from quantize.artifact.writer import ArtifactWriter
from quantize.calibration.data import BUNDLED
from quantize.calibration.sources import Calibration
from quantize.checkpoint.files_seen import sha256
from quantize.checkpoint.paths import check_low_disk
from quantize.checkpoint.remote_shards import RemoteShards
from quantize.errors import UsageError, own_words_shown
from quantize.nn.device import free_memory, resolve_device
from quantize.nn.prefix_tokens import PrefixTokens
from quantize.pipeline.block_loop import run_blocks
from quantize.pipeline.context import RunContext, running
from quantize.pipeline.distributed import SingleProcess, init_distributed
from quantize.pipeline.estimate.device_memory import foretell, limit_on, table
from quantize.pipeline.estimate.report import shard_names
from quantize.pipeline.finalize import calibration_record, finish
from quantize.pipeline.fingerprint import Fingerprint, diff_fingerprints
from quantize.pipeline.fold_check import check_folds, resolve_rotations
from quantize.pipeline.grid_choice import choose_grids
from quantize.pipeline.held_out import HeldOutRows
from quantize.pipeline.layer_schemes import describe_fallbacks
from quantize.pipeline.mixed_precision.resolve import resolve_bits
from quantize.pipeline.placement import Placement
from quantize.pipeline.prepare import Prepared, describe_run, identity_of, prepare
from quantize.pipeline.prune import as_pruned, check_prune, prune_experts
from quantize.pipeline.resume.work_dir import ResumableWriter, join_journal, remote_shards
from quantize.pipeline.sequential import SequentialPipeline
from quantize.pipeline.statistics_files import StatisticsFile, collect, load_matching, write_collected
from quantize.pipeline.steps.prefix_search import resolve_prefix
from quantize.pipeline.target import check_target
from quantize.pipeline.verdict import sentence, unseen_experts, warnings
from quantize.recipe.fit import check_length
from quantize.recipe.recipe import Recipe, load_recipe
from quantize.scheme.scheme import Engine


@dataclass(frozen=True)
class Artifact:
    """A finished run.

    Attributes:
        directory: the directory of the artifact.
        manifest: what its `manifest.json` says.
        module: the module in memory that was quantized, if transformers does not know its class.
    """

    directory: Path
    manifest: dict[str, Any]
    module: nn.Module | None = field(default=None, repr=False)

    def __fspath__(self) -> str:
        return str(self.directory)

    def load(self, engine: Engine = "fake_quant") -> nn.Module:
        """Load the quantized model; `engine` is that of `quantize.load`. A module that was given stays as it is."""
        trusted = "remote_code" in self.manifest  # the run was told so
        return load(self.directory, skeleton=copy.deepcopy(self.module), engine=engine, trust_remote_code=trusted)

    @property
    def warning(self) -> str:
        """Why the result may not be worth its calibration, as plain rounding is as near or was all there was; or ''."""
        return "; ".join(warnings(self.manifest))

    def record(self) -> dict[str, Any]:
        """Return what `summary` says as plain data: the directory, the digest, bytes, schemes, losses and warnings."""
        names = ("digest", "bytes", "float_bytes", "schemes", "held_out")
        found = {name: self.manifest[name] for name in names if name in self.manifest}
        return {"directory": str(self.directory), **found, "warnings": warnings(self.manifest)}

    def summary(self) -> str:
        """Describe what was quantized and how, and in a second line what it lost on data that the run did not see."""
        body = self.manifest["body"]
        share = body["quantized"] / max(1, body["parameters"])
        counts = self.manifest["schemes"]
        first, *others = (f"{label} in {count}" for label, count in counts.items())
        mixed = ", ".join([f"{first} linears", *others])
        size = sum(path.stat().st_size for path in self.directory.glob("model-*.safetensors"))
        how = "" if self.manifest["export"]["exported"] else "online transforms only as it cannot be exported, "
        worst = max((d for blocks in self.manifest["gate"]["passes"].values() for d in blocks.values()), default=0.0)
        scheme = mixed if len(counts) > 1 else next(iter(counts))
        first_line = (
            f"{self.directory}: {scheme}, {share:.1%} of the body's parameters quantized, {how}{size:,} bytes where "
            f"the float model has {self.manifest['float_bytes']:,}, largest difference at the gate {worst:.1e}, "
            f"read back equal within {self.manifest['parity']['reloaded']:.1e}"
        )
        judged = self.manifest.get("held_out")
        return f"{first_line}\n{sentence(judged)}" if judged else first_line


def quantize_model(
    model: str | Path | nn.Module,
    *,
    output_dir: str | Path,
    scheme: str | None = None,
    target: str | None = None,
    calibration: Calibration | None = None,
    tokenizer: Any = None,
    text_column: str | None = None,
    adapter: str | Path | None = None,
    recipe: str | Path | Mapping[str, Any] | None = None,
    nsamples: int | None = None,
    seqlen: int | None = None,
    group_size: int | None = None,
    ignore: Sequence[str] = (),
    average_bits: float | None = None,
    seed: int | None = None,
    trust_remote_code: bool = False,
    requantize: bool = False,
    low_disk: bool = False,
    resume: bool = False,
    force: bool = False,
    stats: str | Path | None = None,
    device: str | torch.device = "cpu",
    device_memory: str | None = None,
    console: Console | None = None,
    progress: bool = False,
    verbose: bool = False,
) -> Artifact:
    """Quantize a model into a new directory.

    The run works in `.NAME.partial` beside it. If the process is killed, that directory stays; the same call with
    `resume` goes on after the last finished block and gives the same bytes, on the same machine with as many threads.

    Args:
        model: a directory, a hub id, or a module whose forward takes token ids [batch, sequence]; a module of
            transformers may take other inputs as well.
        output_dir: the directory of the artifact, which must not exist.
        scheme: `W8A8`, `W8A16`, `W6A6`, `W4A16`, `W3A16`, `W4A8`, `W4A4`, `MXFP4` or `NVFP4`; None takes the recipe's.
        target: the runtime that is to execute the result, a key of `TARGETS`: it decides the default recipe, and what
            it cannot execute is refused before the run.
        calibration: a file of text, of rows or of tensors, a directory of `datasets`, or a data set of the hub
            (docs/calibration.md); or texts, lists of ids, a tensor [samples, ...], a tensor for each input, or batches
            of these; None takes the bundled prose.
        tokenizer: a tokenizer of transformers, for a module in memory; the artifact takes it along.
        text_column: which column of the rows holds the text or the conversation; None finds it.
        adapter: the directory of a LoRA adapter of the model, which is merged into its weights while they are read.
        recipe: a TOML file, the name of a recipe of the package, or a recipe's content, which changes the scheme's
            default recipe.
        nsamples, seqlen: the number of calibration windows, and of tokens in each.
        group_size: the number of columns that share a scale; 0 is per-channel.
        ignore: further linears that stay in floating point: names, or `re:` and an expression.
        average_bits: the most bits that a weight may take on average: the run measures which linears take more.
        seed: the seed of every random choice.
        trust_remote_code: whether code of the model's own may run, if transformers has no class for it.
        requantize: round weights anew that lie on a grid of the format already, which are kept as they are otherwise.
        low_disk: fetch a model of the hub file by file, and keep no more than three of its files with weights.
        resume: go on with a run that was killed or failed, if there is one.
        force: with `resume`: go on although the device, or what computes there, is another one than before.
        stats: statistics that `collect_stats` or `merge_stats` wrote, in place of running the calibration data.
        device: where the run computes: `cpu`, `cuda`, `cuda:1`, or `auto`, a GPU if there is one.
        device_memory: the most that the run may hold on the device, as `24GB`; None takes what is free on a GPU.
        console: the console that shows progress; None shows nothing.
        progress: show progress on the standard error stream, without a console of your own.
        verbose: show the plan and the whole recipe as well, and what other libraries say where something fails.

    Raises:
        UsageError: the call, the recipe or a path is wrong, or the run to be resumed depends on something that changed.
        QuantizeError: the run failed; what is finished is kept for `resume`, and nothing else is left behind.
    """
    given = resolve_device(device)
    changes = Path(recipe) if isinstance(recipe, str) else recipe
    single: dict[str, float | None] = {
        "nsamples": nsamples,
        "seqlen": seqlen,
        "seed": seed,
        "average_bits": average_bits,
        "requantize": requantize or None,
    }
    resolved = load_recipe(scheme, changes, ignore=tuple(ignore), group_size=group_size, target=target, **single)
    check_prune(resolved, statistics=stats is not None)
    check_low_disk(model, low_disk)
    output, console = Path(output_dir), Console(stderr=True) if progress and console is None else console
    named = getattr(transformers, type(model).__name__, None)
    skeleton = model if isinstance(model, nn.Module) and type(model) is not named else None
    with (
        own_words_shown(verbose and console is not None),
        init_distributed(given) as (ranks, here),
        ResumableWriter(output, resume) if ranks.is_rank_zero else contextlib.nullcontext() as writer,
        remote_shards(str(model), output, ranks) if low_disk else contextlib.nullcontext(model) as source,
    ):
        prepared = prepare(
            source,
            resolved,
            calibration,
            judge=stats is None,
            tokenizer=tokenizer,
            text_column=text_column,
            adapter=adapter,
            trust_remote_code=trust_remote_code,
        )
        what_stays = as_pruned(prepared, resolved)  # what cannot be is refused before anything is measured
        if target is not None:
            check_target(target, what_stays)
        if verbose and console is not None and ranks.is_rank_zero:
            console.print(describe_run(prepared), soft_wrap=True, markup=False)
        here = torch.device("cpu") if prepared.program.export_error else here  # its modules run as they are
        ranks = ranks.on(here)
        prepared = replace(prepared, program=prepared.program.to(here))
        found = identity_of(prepared)
        collected = load_matching(Path(stats), prepared, found) if stats else None
        found |= {"data": {"stats": sha256(Path(stats))}} if stats else {}
        check_ranks(resolved, ranks, found)
        journal = writer.begin(found, ranks, force) if writer else join_journal(output, ranks)
        if ranks.gather(writer is not None and writer.finished)[0]:
            return Artifact(output, read_manifest(output), skeleton)
        shown = console if ranks.is_rank_zero else None
        scratch = journal.directory.parent
        place = placement_on(here, device_memory, what_stays)
        context = RunContext(resolved.seed, here, ranks, PrefixTokens(), place, scratch, shown, journal)
        if resolved.prune is not None:
            prepared = prune_experts(prepared, resolved, context)
        manifest = ranks.gather(run_pipeline(prepared, writer, context, collected))[0]
        if console is not None and isinstance(source, RemoteShards):
            console.print(source.summary(), soft_wrap=True, markup=False)
        return Artifact(output, manifest, skeleton)


def collect_stats(
    model: str | Path | nn.Module,
    *,
    output: str | Path,
    recipe: Recipe,
    calibration: Calibration | None = None,
    text_column: str | None = None,
    adapter: str | Path | None = None,
    console: Console | None = None,
) -> StatisticsFile:
    """Write statistics of some calibration data, which `merge_stats` merges with those of other data.

    Args:
        model, calibration, text_column, adapter, console: as in `quantize_model`.
        output: a new file.
        recipe: a resolved recipe (`load_recipe`), which rounds without data and has one pass that asks for statistics.

    Raises:
        UsageError: the call, the recipe or a path is wrong.
        QuantizeError: the run failed.
    """
    check_prune(recipe, statistics=True)
    given = prepare(model, recipe, calibration, judge=False, text_column=text_column, adapter=adapter)
    with running("the model"):
        context = RunContext(recipe.seed, prefix=PrefixTokens(recipe.prefix_tokens), console=console)
        found = collect(given, identity_of(given), context)
    write_collected(Path(output), found)
    return found


def placement_on(device: torch.device, memory: str | None, prepared: Prepared) -> Placement:
    """Return what stays on a device, so that a run fits into so much of its memory, or into what is free of it.

    Raises:
        UsageError: the memory is no size, or a run on the CPU is given one.
        QuantizeError: the run does not fit.
    """
    limit = limit_on(device.type, memory, free_memory(device))
    return Placement() if limit is None else foretell(prepared).fitted(limit)


def check_ranks(recipe: Recipe, ranks: SingleProcess, found: Fingerprint) -> None:
    """Check that several ranks can do what the recipe asks for, and have the same model, data and code.

    Raises:
        UsageError: they cannot, or have not.
    """
    if ranks.count > 1 and recipe.tune is not None:
        raise UsageError("recipe: tune runs in one process; start without torchrun, or leave the table tune out")
    for rank, other in enumerate(ranks.gather(found)):
        if changed := diff_fingerprints(other, found):
            raise UsageError(f"{' and '.join(changed)} of rank {rank} differs from that of rank {ranks.rank}")


def run_pipeline(
    prepared: Prepared, writer: ArtifactWriter | None, context: RunContext, collected: StatisticsFile | None = None
) -> dict[str, Any]:
    """Quantize block by block, verify the written files, and commit; return the manifest.

    Args:
        writer: an open writer; None on ranks other than rank 0, which write nothing and return no manifest.
        collected: statistics in place of running the calibration data.

    Raises:
        QuantizeError: the run failed.
    """
    console = context.console
    with running("the model"):
        prepared = replace(prepared, plan=choose_grids(prepared, context))
    plan, prefix = resolve_prefix(prepared, context)
    check_length(prepared.checkpoint.config, plan.recipe)
    prepared, context = replace(prepared, plan=plan), replace(context, prefix=PrefixTokens(plan.recipe.prefix_tokens))
    announce(prepared, console)
    with running("the model"):
        if collected is None:
            prepared = replace(prepared, plan=resolve_rotations(prepared, context))
        else:
            check_folds(prepared, context)  # its statistics were collected behind all rotations
        plan, bits = resolve_bits(prepared, context)
        prepared = replace(prepared, plan=plan)
        surveys = None if collected is None else {collected.step: collected.statistics}
        make = functools.partial(SequentialPipeline, prepared, surveys=surveys, calibrate=collected is None)
    names = shard_names(prepared)
    blocks = run_blocks(make, names, writer, context, lambda placement: table(foretell(prepared).held(placement)))
    if not writer:
        return {}
    data = calibration_record(prepared) if collected is None else collected.record()
    manifest = finish(
        prepared, writer, blocks, names[-1], {"calibration": data, "prefix": prefix, "average_bits": bits}, console
    )
    for line in prepared.plan.body.lines() if console is not None else ():
        console.print(line, soft_wrap=True, markup=False)  # type: ignore[union-attr]
    if console is not None:
        unseen = "" if plan.recipe.calibrate_all_experts else unseen_experts(manifest.get("expert_tokens", {}))
        for warning in [*warnings(manifest), *([unseen] if unseen else [])]:
            console.print(f"warning: {warning}", soft_wrap=True, markup=False)
    return manifest


def announce(prepared: Prepared, console: Console | None) -> None:
    """Print what is odd about the files, what the exporter refused, and which data is used."""
    if console is None:
        return
    refused = prepared.program.export_error_message if prepared.program.export_error else ""
    for note in filter(None, (*prepared.checkpoint.notes, refused, prepared.plan.note)):
        console.print(note, soft_wrap=True, markup=False)
    for line in describe_fallbacks(prepared.plan.recipe, prepared.plan.schemes, prepared.program.all_linears):
        console.print(line, soft_wrap=True)
    if not prepared.plan.calibrates:
        return
    rows, wanted = len(prepared.samples.rows), prepared.plan.recipe.nsamples
    line = f"quantizing on {rows} calibration rows of {wanted} asked for, {prepared.samples.size()}"
    bundled = prepared.samples.sha256 == sha256(BUNDLED)
    source = ", bundled prose: give --calibration for text of your own" if bundled else ""
    held = prepared.held_out if prepared.held_out.source == "calibration data" else HeldOutRows()
    back = f", {len(held.rows)} more held back to judge the result by" if held.rows else ""
    console.print(line + back + source, soft_wrap=True, markup=False)
