"""load → calibrate → transform → quantize → verify → write, block by block."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from quantize import gate
from quantize.artifact import ArtifactWriter, as_json, load, read_manifest, sha256
from quantize.attention_check import attention_count, check_kv_cache
from quantize.blocks import BlockRun, quantization_settings
from quantize.calibration.data import BUNDLED, Samples
from quantize.calibration.tensors import read_calibration
from quantize.checkpoint import Checkpoint, build_skeleton, check_weights, open_checkpoint, side_files
from quantize.collected import Collected, collect, fitting, write_collected
from quantize.errors import QuantizeError, UsageError, reason
from quantize.graph.inputs import example_inputs
from quantize.graph.program import Program
from quantize.graph.unexported import make_program
from quantize.identity import Identity, changes, identity, versions
from quantize.journal import Journal
from quantize.partial import Onlooker, ResumableWriter
from quantize.plan import NO_LINEAR, Plan, make_plan
from quantize.prefix import check_prefix, settle_prefix
from quantize.progress import track
from quantize.ranks import Ranks, joined
from quantize.recipe import Recipe, load_recipe
from quantize.tokenizer import load_tokenize
from quantize.verify import at_last_token, parity, written_output


@dataclass(frozen=True)
class Artifact:
    """A finished run: where it lies, and its manifest."""

    directory: Path
    manifest: dict[str, Any]

    def __fspath__(self) -> str:
        return str(self.directory)

    def load(self) -> nn.Module:
        """The quantized model."""
        return load(self.directory)

    def summary(self) -> str:
        """One sentence: what was made of how much."""
        done = sum(how == "quantized" for how in self.manifest["coverage"].values())
        size = sum(path.stat().st_size for path in self.directory.glob("model-*.safetensors"))
        how = "" if self.manifest["export"]["exported"] else "online transforms only as it cannot be exported, "
        worst = max((d for blocks in self.manifest["gate"]["passes"].values() for d in blocks.values()), default=0.0)
        return (
            f"{self.directory}: {self.manifest['scheme']}, {done} of {len(self.manifest['coverage'])} parameters "
            f"quantized, {how}{size:,} bytes, largest difference at the gate {worst:.1e}, "
            f"read back equal within {self.manifest['parity']['reloaded']:.1e}"
        )


@dataclass(frozen=True)
class Prepared:
    """A run before it changes anything: the model, what happens where, and the data."""

    checkpoint: Checkpoint
    program: Program
    plan: Plan
    samples: Samples


def quantize_model(
    model: str | Path | nn.Module,
    *,
    output_dir: str | Path,
    scheme: str | None = None,
    calibration: str | Path | None = None,
    recipe: str | Path | Mapping[str, Any] | None = None,
    nsamples: int | None = None,
    seqlen: int | None = None,
    group_size: int | None = None,
    ignore: Sequence[str] = (),
    seed: int | None = None,
    resume: bool = False,
    stats: str | Path | None = None,
    console: Console | None = None,
) -> Artifact:
    """Quantize a model into a new directory.

    The run works in `.NAME.partial` beside it. If the process is killed, that directory stays; the same call with
    `resume` goes on behind the last finished block and gives the same bytes, on the same machine with as many threads.

    Args:
        model: a directory, a hub id, or a module whose forward takes token ids [batch, sequence]; one of transformers
            also with other inputs.
        output_dir: the artifact; must not exist.
        scheme: `W8A8`, `W6A6`, `W4A16`, `W4A8`, `W4A4`, `MXFP4` or `NVFP4`; None takes the recipe's.
        calibration: `.txt`, `.jsonl` with rows of `text` or `input_ids`, or `.safetensors` with a tensor [samples, ...]
            for each input; None takes the bundled prose.
        recipe: TOML file, name of a recipe of the package, or content of one, that changes the scheme's default recipe.
        nsamples, seqlen: calibration windows, and tokens in each.
        group_size: columns that share a scale; 0 is per-channel.
        ignore: further linears to leave alone: names, or `re:` and an expression.
        seed: of every random choice.
        resume: go on with a run that was killed or failed, if there is one; keep what is done if this one fails.
        stats: statistics that `collect_stats` or `merge_stats` wrote, in place of running the calibration data.
        console: where progress is shown; None is silent.

    Raises:
        UsageError: wrong call, recipe or path; or what the run to be resumed depends on has changed.
        QuantizeError: the run failed; nothing is left behind, unless with `resume`.
    """
    changes = Path(recipe) if isinstance(recipe, str) else recipe
    resolved = load_recipe(
        scheme, changes, ignore=tuple(ignore), group_size=group_size, nsamples=nsamples, seqlen=seqlen, seed=seed
    )
    output = Path(output_dir)
    with joined() as ranks, ResumableWriter(output, resume) if ranks.first else Onlooker(output) as writer:
        prepared = prepare(model, resolved, Path(calibration) if calibration else None)
        found = identity_of(prepared)
        collected = fitting(Path(stats), found) if stats else None
        found |= {"data": {"stats": sha256(Path(stats))}} if stats else {}
        check_ranks(resolved, ranks, found)
        journal = writer.begin(found, ranks)
        if ranks.gather(writer.finished)[0]:
            return Artifact(output, read_manifest(output))
        return run(prepared, writer, console if ranks.first else None, journal, ranks, collected)


def prepare(model: str | Path | nn.Module, recipe: Recipe, calibration: Path | None, *, read: bool = True) -> Prepared:
    """Everything that can be decided, and everything that can be wrong, before the first block.

    Without `read` no weight is read, and so none that is wrong found.
    """
    checkpoint = open_checkpoint(model)
    skeleton = checkpoint.skeleton()
    if read:
        check_weights(checkpoint, skeleton)
    check_length(checkpoint.config, recipe)
    inputs = example_inputs(skeleton)
    program = make_program(checkpoint, skeleton)
    plan = make_plan(recipe, program)
    check_prefix(plan, program, checkpoint, skeleton)
    if recipe.kv_cache is not None:
        check_kv_cache(program, skeleton)
    tokenize = load_tokenize(checkpoint.directory)
    samples = read_calibration(calibration, inputs, recipe.seqlen, recipe.nsamples, tokenize, program.vocabulary)
    return Prepared(checkpoint, program, plan, samples)


def check_length(config: Mapping[str, Any], recipe: Recipe) -> None:
    """The windows fit the model's positions."""
    longest = config.get("max_position_embeddings")
    p = len(recipe.prefix_tokens)
    if isinstance(longest, int) and recipe.seqlen + p > longest:
        more = f" with the prefix of {p}" if p else ""
        raise UsageError(f"--seqlen {recipe.seqlen}{more} is more than the {longest} positions of the model")


def collect_stats(
    model: str | Path | nn.Module,
    *,
    output: str | Path,
    recipe: Recipe,
    calibration: str | Path | None = None,
    console: Console | None = None,
) -> Collected:
    """Write statistics of some calibration data, to be merged with those of other data by `merge_stats`.

    Args:
        model, calibration, console: as in `quantize_model`.
        output: new file.
        recipe: resolved (`load_recipe`); it rounds without data, and one of its passes asks for statistics.

    Raises:
        UsageError: wrong call, recipe or path.
        QuantizeError: the run failed.
    """
    given = prepare(model, recipe, Path(calibration) if calibration else None)
    with running("the model"):
        found = collect(given.checkpoint, given.program, given.plan, given.samples, identity_of(given), console)
    write_collected(Path(output), found)
    return found


def check_ranks(recipe: Recipe, ranks: Ranks, found: Identity) -> None:
    """Several ranks can do what the recipe asks for, and see the same model, data and code.

    Raises:
        UsageError: they cannot, or do not.
    """
    if ranks.count > 1 and recipe.tune is not None:
        raise UsageError("recipe: tune runs in one process; start without torchrun, or leave the table tune out")
    for rank, other in enumerate(ranks.gather(found)):
        if changed := changes(other, found):
            raise UsageError(f"{' and '.join(changed)} of rank {rank} differs from that of rank {ranks.rank}")


def identity_of(prepared: Prepared) -> Identity:
    """What the artifact of a run depends on."""
    graph = str(prepared.program.module.graph)
    return identity(prepared.checkpoint, graph, prepared.plan.recipe, prepared.samples)


def run(
    prepared: Prepared,
    writer: ArtifactWriter,
    console: Console | None,
    journal: Journal | None = None,
    ranks: Ranks | None = None,
    collected: Collected | None = None,
) -> Artifact:
    """Quantize block by block into an open writer, verify what was written, and commit."""
    journal, ranks = journal or Journal(), ranks or Ranks()
    program, checkpoint = prepared.program, prepared.checkpoint
    plan, prefix = settle_prefix(prepared.plan, program, checkpoint, prepared.samples, console, journal.once)
    check_length(checkpoint.config, plan.recipe)
    prepared = replace(prepared, plan=plan)
    announce(prepared, console)
    with running("the model"):
        surveys = None if collected is None else {collected.step: collected.statistics}
        blocks = BlockRun(
            checkpoint, program, plan, prepared.samples, console, journal.once, ranks, surveys, writer.directory
        )
    done = journal.restore(blocks, writer)
    if done and console is not None:
        console.print(f"going on behind block {done} of {len(program.segments)}, {program.segments[done - 1].name}")
    for number, segment in enumerate(track(program.segments[done:], "quantizing", lambda s: s.name, console), done + 1):
        with running(segment.name):
            writer.add(shard_name(program, number), blocks.process(segment))
        journal.record(number, blocks, writer)
    data = calibration_record(prepared) if collected is None else collected.record()
    manifest = finish(prepared, writer, blocks, {"calibration": data, "prefix": prefix}, console) if ranks.first else {}
    return Artifact(writer.output, ranks.gather(manifest)[0])


def finish(
    prepared: Prepared, writer: ArtifactWriter, blocks: BlockRun, data: Mapping[str, Any], console: Console | None
) -> dict[str, Any]:
    """Add all that is no block, verify what was written, and commit; returns the manifest, with what is in `data`."""
    program, checkpoint, plan = prepared.program, prepared.checkpoint, prepared.plan
    writer.add(shard_name(program, len(program.segments) + 1), blocks.unused())
    settings = quantization_settings(plan.recipe, blocks.modules)
    write_side_files(prepared, writer, blocks, settings)
    probes, outputs = blocks.probes_run(), blocks.outputs()
    proof = parity(program, writer.directory, settings, checkpoint.ties, probes, outputs, console)
    return writer.commit(
        {
            "scheme": plan.recipe.scheme,
            "seed": plan.recipe.seed,
            "versions": versions(),
            "export": program.export_record() | {"not_compared": not_compared(blocks)},
            "gate": {"tolerance": gate.TOLERANCE, "passes": blocks.transformer.differences},
            "online": blocks.transformer.changed,
            "parity": proof,
            "untied": blocks.untied,
            **{name: record for name, record in data.items() if record},
            "coverage": coverage(plan, blocks),
            "quantization": settings,
        }
    )


def shard_name(program: Program, number: int) -> str:
    """Of the file of a block, counted from 1, or of all that is left."""
    return f"model-{number:05}-of-{len(program.segments) + 1:05}.safetensors"


def announce(prepared: Prepared, console: Console | None) -> None:
    """Say what the exporter refused, and what is calibrated on, above all if it is not the user's own text."""
    if console is not None and prepared.program.refused:
        console.print(prepared.program.refusal, soft_wrap=True, markup=False)
    if console is None or not prepared.plan.calibrates:
        return
    rows, wanted = len(prepared.samples.rows), prepared.plan.recipe.nsamples
    line = f"quantizing on {rows} calibration rows of {wanted} asked for, {prepared.samples.tokens} tokens"
    bundled = prepared.samples.sha256 == sha256(BUNDLED)
    source = ", bundled prose: give --calibration for text of your own" if bundled else ""
    console.print(line + source, soft_wrap=True)


@contextlib.contextmanager
def running(name: str) -> Iterator[None]:
    """Turn an operator's refusal of its operands into the reason why a part of the model does not run."""
    try:
        yield
    except (IndexError, RuntimeError) as error:
        raise QuantizeError(
            f"{name} does not run on the calibration data ({reason(error)}); "
            "if that has more tokens in a row than the model has positions, give a smaller --seqlen"
        ) from error


def write_side_files(prepared: Prepared, writer: ArtifactWriter, blocks: BlockRun, settings: dict[str, Any]) -> None:
    """Config, resolved recipe, tensor index, tokenizer and other side files, and the probes with their outputs."""
    checkpoint = prepared.checkpoint
    if checkpoint.config:
        untied = {"tie_word_embeddings": False} if blocks.untied else {}
        writer.write("config.json", as_json({**checkpoint.config, **untied, "quantization_config": settings}))
    writer.write("recipe.toml", prepared.plan.recipe.to_toml())
    writer.write_index()
    if checkpoint.directory is not None:
        for path in side_files(checkpoint.directory):
            writer.write(path, (checkpoint.directory / path).read_bytes())
    given = {name: torch.cat([probe[name] for probe in blocks.probe_inputs]) for name in blocks.probe_inputs[0]}
    if prepared.program.refused:
        fresh = build_skeleton(checkpoint.config) if checkpoint.config else checkpoint.skeleton()
        output = written_output(fresh, writer.directory, settings, given)
    else:
        first = len(prepared.program.output.all_input_nodes)
        output = torch.cat([at_last_token(found) for found in blocks.outputs()[::first]])
    writer.add_probe({**given, "output": output})


def calibration_record(prepared: Prepared) -> dict[str, Any]:
    """Which data was used, and how much of it."""
    samples = prepared.samples
    rows, tokens = (len(samples.rows), samples.tokens) if prepared.plan.calibrates else (0, 0)
    return {"sha256": samples.sha256, "rows": rows, "tokens": tokens}


def not_compared(blocks: BlockRun) -> list[str]:
    """Quantized linears that ran on no probe, so that neither gate nor parity saw them."""
    return [path for path in blocks.program.idle(blocks.outputs()) if path in blocks.modules]


def coverage(plan: Plan, blocks: BlockRun) -> dict[str, str]:
    """Every parameter: quantized, or the reason why not."""
    linears = (linear for segment in blocks.program.segments for linear in blocks.program.linears(segment))
    done = {linear.weight: "quantized" for linear in linears if linear.path in blocks.modules}
    return dict(sorted((plan.skipped | done).items()))


def describe(prepared: Prepared) -> str:
    """What a run would do, in lines."""
    plan, program = prepared.plan, prepared.program
    what = f"{len(plan.targets)} linears in {len(program.segments)} blocks"
    lines = [f"{plan.recipe.scheme}: {what}, rounded by {plan.quantizer.name}"]
    lines += [program.refusal] if program.refused else []
    if cache := plan.recipe.kv_cache:
        lines.append(f"kv_cache: {cache.num_bits} bits at {attention_count(program)} attentions")
    for step in plan.steps:
        lines.append(f"pass {step.handler.name}: {len(step.sites)} bases offline, {len(step.online)} linears online")
    lines += [f"not quantized: {name} ({why})" for name, why in plan.skipped.items() if why != NO_LINEAR]
    lines.append(f"calibration: {len(prepared.samples.rows)} rows, {prepared.samples.tokens} tokens")
    return "\n".join([*lines, "", plan.recipe.to_toml()])
