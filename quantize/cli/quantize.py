"""The command `quantize-model quantize`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from quantize.checkpoint.paths import check_low_disk, require_directory, require_file
from quantize.cli.arguments import PATH, TRUST, SchemeType, check_recipe, check_run, on_hub
from quantize.cli.model_free import FORMATS, rounded_alone, run_model_free
from quantize.errors import UsageError, own_words_shown
from quantize.recipe.targets import TARGETS


@click.command()
@click.argument("model")
@click.option(
    "--scheme", type=SchemeType(), help="The scheme, which fixes the bits of weights and activations; case is ignored."
)
@click.option(
    "--target",
    type=click.Choice(sorted(TARGETS)),
    help="The runtime that is to execute the result: it decides the default recipe, and what it cannot execute is "
    "refused before the run.",
)
@click.option("-o", "--output-dir", type=PATH, help="The new directory that the artifact is written to.")
@click.option(
    "--recipe",
    type=PATH,
    help="A TOML or YAML file that changes the scheme's default recipe, or the name of a shipped one.",
)
@click.option(
    "--calibration",
    type=PATH,
    help="The data to calibrate on: text (.txt); rows of text, messages or input_ids (.jsonl, .json, .csv, .parquet, a "
    "directory of datasets, or owner/name of a data set on the hub); or tensors (.safetensors, .pt).  "
    "[default: bundled prose]",
)
@click.option("--text-column", metavar="NAME", help="Which column of the rows holds the text or the messages.")
@click.option(
    "--adapter", type=PATH, help="The directory of a LoRA adapter of MODEL, which is merged into its weights."
)
@click.option("--revision", help="The branch, tag or commit of a MODEL on the hub.  [default: main]")
@click.option(
    "--low-disk",
    is_flag=True,
    help="Fetch a MODEL on the hub file by file, and keep no more than three of its files with weights at a time.",
)
@TRUST
@click.option("--nsamples", type=click.IntRange(1), help="The number of calibration windows.  [default: 32]")
@click.option("--seqlen", type=click.IntRange(2), help="The number of tokens in a window.  [default: 512]")
@click.option(
    "--group-size",
    type=click.IntRange(0),
    help="The number of weight columns that share a scale; 0 is one scale for each output channel.  "
    "[default: 128; W8A8: 0, W8A16: 0, W6A6: 0, MXFP4: 32, NVFP4: 16]",
)
@click.option(
    "--average-bits",
    type=click.FloatRange(0, min_open=True),
    help="The most bits that a weight may take on average, scales included: the run measures which linears take 8 bits "
    "or other groups.",
)
@click.option(
    "--ignore",
    multiple=True,
    metavar="PATTERN",
    help="Linears to leave in floating point: names or globs, separated by commas, or one re:EXPRESSION. May be given "
    "several times.",
)
@click.option(
    "--requantize",
    is_flag=True,
    default=None,
    help="Round weights anew that lie on a grid of the scheme already; otherwise they are kept exactly.",
)
@click.option(
    "--model-free",
    is_flag=True,
    help="Round the weights file by file without the model's code, whatever its architecture.",
)
@click.option(
    "--format",
    type=click.Choice(FORMATS),
    help="With --model-free: what is written, a checkpoint of compressed-tensors, an artifact, or a GGUF file.  "
    "[default: compressed-tensors]",
)
@click.option("--seed", type=click.IntRange(0), help="Seed of every random choice the run makes.  [default: 0]")
@click.option("--device", default="cpu", help="Where the run computes: cpu, cuda, cuda:1, or auto.  [default: cpu]")
@click.option(
    "--device-memory",
    metavar="SIZE",
    help="The most that the run may hold on a --device with memory of its own, as 24GB.  [default: what is free]",
)
@click.option(
    "--strict",
    is_flag=True,
    help="Exit with 1 if plain rounding turns out to lose no more, or was all that could be done somewhere.",
)
@click.option("--resume", is_flag=True, help="Go on with a run that was killed or failed.")
@click.option(
    "--force", is_flag=True, help="With --resume: go on although the device, or what computes there, is another one."
)
@click.option("--stats", type=PATH, help="A file of merge-stats, whose statistics take the place of calibration data.")
@click.option("--collect-stats", type=PATH, help="Write the calibration data's statistics to this new file, and stop.")
@click.option(
    "--dry-run",
    is_flag=True,
    help="Say what the run would do and what it would take; the first block is run to measure the time.",
)
@click.option(
    "--progress",
    type=click.Choice(["text", "json"]),
    default="text",
    show_default=True,
    help="For whom progress is: a person (standard error), or a program (one JSON object a line, standard output).",
)
@click.option("-q", "--quiet", is_flag=True, help="Show no progress.")
@click.option(
    "-v",
    "--verbose",
    is_flag=True,
    help="Show the plan and the whole recipe first, and what other libraries say where something fails.",
)
def quantize(
    model: str,
    scheme: str | None,
    target: str | None,
    output_dir: Path | None,
    recipe: Path | None,
    calibration: Path | None,
    text_column: str | None,
    adapter: Path | None,
    revision: str | None,
    trust_remote_code: bool,
    model_free: bool,
    format: str | None,
    low_disk: bool,
    resume: bool,
    force: bool,
    stats: Path | None,
    collect_stats: Path | None,
    dry_run: bool,
    device: str,
    device_memory: str | None,
    strict: bool,
    progress: str,
    quiet: bool,
    verbose: bool,
    **settings: Any,
) -> None:
    """Quantize MODEL into a new directory.

    MODEL is a directory, one .safetensors file beside its config.json, or a hub id.
    """
    if revision is not None:
        model = on_hub(model, revision)
    if format is not None and not model_free:
        raise UsageError(f"--format {format} is for --model-free; leave it out, and export the artifact to that format")
    if force and not resume:
        raise UsageError("--force is for --resume; leave it out, or give --resume as well")
    check_low_disk(model, low_disk)
    output = None if dry_run else output_dir
    check_run(model, calibration, output, resume)
    check_recipe(model, scheme, target, recipe, settings["seqlen"], settings["ignore"], model_free)
    if adapter is not None:
        require_directory(adapter, "adapter")
    if stats is not None:
        require_file(stats)
    if output_dir is None and not dry_run and collect_stats is None:
        raise UsageError("give --output-dir, a directory that does not exist yet")
    if model_free:
        options = dict(settings, calibration=calibration, text_column=text_column, adapter=adapter, stats=stats,
                       collect_stats=collect_stats, trust_remote_code=trust_remote_code, device=device,
                       device_memory=device_memory, force=force)  # fmt: skip
        known = dict(scheme=scheme, recipe=recipe, low_disk=low_disk, resume=resume)
        call = rounded_alone(options, target, format, **known)
        with own_words_shown(verbose):
            return run_model_free(model, output, call, progress, quiet)
    from quantize.pipeline.distributed import is_rank_zero
    from quantize.pipeline.progress import JsonConsole
    from quantize.pipeline.quantize import collect_stats as collect
    from quantize.pipeline.quantize import quantize_model
    from quantize.recipe.recipe import load_recipe

    program = JsonConsole() if progress == "json" else None
    say = click.echo if program is None else program.print
    console = None if quiet else program or Console(stderr=True)
    if dry_run:
        from quantize.checkpoint.remote_shards import headers_alone
        from quantize.export.targets import exports
        from quantize.pipeline.estimate.device_memory import foretold_lines
        from quantize.pipeline.estimate.report import estimates, preflight
        from quantize.pipeline.prepare import describe_run, prepare
        from quantize.pipeline.prune import as_pruned

        chosen = load_recipe(scheme, recipe, target=target, **settings)
        with own_words_shown(verbose), headers_alone(model, low_disk) as source:
            given = prepare(
                source,
                chosen,
                calibration,
                read=False,
                text_column=text_column,
                adapter=adapter,
                trust_remote_code=trust_remote_code,
            )
            prepared = as_pruned(given, chosen)
            found = preflight(prepared)
            told = estimates(found, prepared.seconds, console)
            there = foretold_lines(prepared, device, device_memory)
            lines = [*told, *there, *found.hadamards(), *exports(found), describe_run(prepared)]
        return say("\n".join(lines))
    if collect_stats is not None:
        chosen = load_recipe(scheme, recipe, target=target, **settings)
        statistics = collect(
            model,
            output=collect_stats,
            recipe=chosen,
            calibration=calibration,
            text_column=text_column,
            adapter=adapter,
            console=console,
        )
        return say(f"{collect_stats}: statistics of {statistics.record()['tokens']} tokens")
    assert output_dir is not None
    artifact = quantize_model(
        model,
        output_dir=output_dir,
        scheme=scheme,
        calibration=calibration,
        text_column=text_column,
        adapter=adapter,
        trust_remote_code=trust_remote_code,
        recipe=recipe,
        target=target,
        low_disk=low_disk,
        resume=resume,
        force=force,
        stats=stats,
        device=device,
        device_memory=device_memory,
        console=console,
        verbose=verbose,
        **settings,
    )
    following = next_command(model, output_dir, target)
    if is_rank_zero() and program is not None:
        program.event("done", **artifact.record(), next=following)
    elif is_rank_zero():
        click.echo(f"{artifact.summary()}\ndigest {artifact.manifest['digest']}\nnext: {following}")
    if strict and artifact.warning:
        sys.exit(1)


def next_command(model: str, output: Path, target: str | None) -> str:
    """Return what a person most likely does with a new artifact."""
    if target is None:
        return f"quantize-model eval {output} --against {model} --text FILE"
    return f"quantize-model export {output} --format {TARGETS[target].format} --output-dir {output}-{target}"
