"""The command `quantize-model`."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import click
from click_default_group import DefaultGroup
from rich.console import Console

from quantize.errors import QuantizeError, UsageError, reason
from quantize.export.command import export
from quantize.scheme.scheme import ENGINES, SCHEME_NAMES, Engine

PATH = click.Path(path_type=Path)


@click.command()
@click.argument("model")
@click.option(
    "--scheme", type=click.Choice(SCHEME_NAMES), help="The scheme, which fixes the bits of weights and activations."
)
@click.option("--output-dir", type=PATH, help="The new directory that the artifact is written to.")
@click.option(
    "--recipe", type=PATH, help="A TOML file that changes the scheme's default recipe, or the name of a shipped recipe."
)
@click.option(
    "--calibration",
    type=PATH,
    help="The data to calibrate on: text (.txt), rows of text or input_ids (.jsonl), or a tensor for each input "
    "(.safetensors).  [default: bundled prose]",
)
@click.option("--nsamples", type=click.IntRange(1), help="The number of calibration windows.  [default: 128]")
@click.option("--seqlen", type=click.IntRange(2), help="The number of tokens in a window.  [default: 512]")
@click.option(
    "--group-size",
    type=click.IntRange(0),
    help="The number of weight columns that share a scale; 0 is one scale for each output channel.  "
    "[default: 128; W8A8: 0, W6A6: 0, MXFP4: 32, NVFP4: 16]",
)
@click.option(
    "--ignore",
    multiple=True,
    metavar="PATTERN",
    help="A linear to leave in floating point: its name, or re:EXPRESSION. May be given several times.",
)
@click.option("--seed", type=click.IntRange(0), help="Seed of every random choice the run makes.  [default: 0]")
@click.option("--device", default="cpu", help="Where the run computes: cpu, cuda, cuda:1, or auto.  [default: cpu]")
@click.option("--strict", is_flag=True, help="Exit with 1 if plain rounding turns out to lose no more.")
@click.option("--resume", is_flag=True, help="Go on with a run that was killed or failed.")
@click.option("--stats", type=PATH, help="A file of merge-stats, whose statistics take the place of calibration data.")
@click.option("--collect-stats", type=PATH, help="Write the calibration data's statistics to this new file, and stop.")
@click.option(
    "--dry-run",
    is_flag=True,
    help="Say what the run would do and what it would take; the first block is run to measure the time.",
)
def quantize(
    model: str,
    scheme: str | None,
    output_dir: Path | None,
    recipe: Path | None,
    calibration: Path | None,
    resume: bool,
    stats: Path | None,
    collect_stats: Path | None,
    dry_run: bool,
    device: str,
    strict: bool,
    **settings: Any,
) -> None:
    """Quantize MODEL into a new directory.

    MODEL is a directory or a hub id.
    """
    from quantize.pipeline.distributed import is_rank_zero
    from quantize.pipeline.quantize import collect_stats as collect
    from quantize.pipeline.quantize import quantize_model
    from quantize.recipe.recipe import load_recipe

    if dry_run:
        from quantize.export.targets import exports
        from quantize.pipeline.estimate.report import estimates, preflight
        from quantize.pipeline.prepare import describe_run, prepare

        prepared = prepare(model, load_recipe(scheme, recipe, **settings), calibration, read=False)
        found = preflight(prepared)
        told = estimates(found, prepared.seconds, Console(stderr=True))
        lines = [*told, *found.hadamards(), *exports(found), describe_run(prepared)]
        return click.echo("\n".join(lines))
    if collect_stats is not None:
        chosen = load_recipe(scheme, recipe, **settings)
        statistics = collect(
            model, output=collect_stats, recipe=chosen, calibration=calibration, console=Console(stderr=True)
        )
        return click.echo(f"{collect_stats}: statistics of {statistics.record()['tokens']} tokens")
    if output_dir is None:
        raise UsageError("give --output-dir, a directory that does not exist yet")
    artifact = quantize_model(
        model,
        output_dir=output_dir,
        scheme=scheme,
        calibration=calibration,
        recipe=recipe,
        resume=resume,
        stats=stats,
        device=device,
        console=Console(stderr=True),
        **settings,
    )
    if is_rank_zero():
        click.echo(f"{artifact.summary()}\ndigest {artifact.manifest['digest']}")
    if strict and artifact.warning:
        sys.exit(1)


@click.command()
@click.argument("model")
@click.option("--activations", is_flag=True, help="Show which activations of the float model are massive instead.")
@click.option("--calibration", type=PATH, help="The text that --activations runs on.  [default: bundled prose]")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def inspect(model: str, activations: bool, calibration: Path | None, as_json: bool) -> None:
    """Show where transforms are legal in MODEL.

    Where a transform is not legal, the reason is given.
    """
    from quantize.checkpoint.checkpoint import open_checkpoint
    from quantize.graph.analysis import admissible_bases
    from quantize.graph.fallback.program import make_program

    checkpoint = open_checkpoint(model)
    program = make_program(checkpoint, checkpoint.skeleton())
    if activations:
        from quantize.eval.activations import activations_table, measure

        found = measure(checkpoint, program, calibration)
        return click.echo(json.dumps(found, indent=2)) if as_json else Console().print(activations_table(found))
    if calibration is not None:
        raise UsageError("--calibration is text for --activations; give both or neither")
    bases = [basis.as_dict() for basis in admissible_bases(program)]
    if as_json:
        return click.echo(json.dumps({"export": program.export_record(), "bases": bases}, indent=2))
    from quantize.eval.bases_table import bases_table

    if program.export_error:
        click.echo(program.export_error_message)
    Console().print(bases_table(bases))


@click.command("eval")
@click.argument("directory", type=PATH)
@click.option("--against", help="The float model, to measure how far the artifact diverges from it.")
@click.option(
    "--text",
    type=PATH,
    required=True,
    help="The text to measure on: .txt or .jsonl for language models, .tsv with scored pairs of sentences "
    "for encoders.",
)
@click.option(
    "--nsamples", type=click.IntRange(1), help="The number of windows, spread evenly over the text.  [default: all]"
)
@click.option(
    "--seqlen", type=click.IntRange(2), default=256, show_default=True, help="The number of tokens in a window."
)
@click.option(
    "--engine",
    type=click.Choice(ENGINES),
    default="fake_quant",
    show_default=True,
    help="How an artifact runs on a CPU: in floating point, or exactly and slowly.",
)
@click.option("--kurtosis", is_flag=True, help="Show instead the kurtosis of the linears' inputs, before and after.")
@click.option("--json", "as_json", is_flag=True, help="Print one flat JSON object instead of a table.")
def evaluate(
    directory: Path,
    against: str | None,
    text: Path,
    nsamples: int | None,
    seqlen: int,
    engine: Engine,
    kurtosis: bool,
    as_json: bool,
) -> None:
    """Measure a model or an artifact on a text."""
    if kurtosis:
        from quantize.eval.report import kurtosis_report

        if against is None:
            raise UsageError("--kurtosis compares with the float model; give --against")
        return Console().print(kurtosis_report(directory, against, text, seqlen))
    from quantize.eval.report import evaluate as measure
    from quantize.eval.report import scores_table

    scores = measure(directory, against, text, seqlen, nsamples, engine)
    click.echo(json.dumps(scores, indent=2)) if as_json else Console().print(scores_table(scores))


@click.command("merge-stats")
@click.argument("files", type=PATH, nargs=-1, required=True)
@click.option("--output", type=PATH, required=True, help="The new file that the merged statistics are written to.")
def merge_stats(files: tuple[Path, ...], output: Path) -> None:
    """Merge the files that --collect-stats wrote.

    Each file holds the statistics of a part of the calibration data.
    """
    from quantize.pipeline.statistics_files import merge_stats

    merged = merge_stats(files, output)
    click.echo(f"{output}: statistics of {merged.record()['tokens']} tokens in {len(merged.data)} parts")


@click.command()
@click.argument("directory", type=PATH)
@click.option("--prompt", help="The text to continue; for a model of sound, how its text begins.")
@click.option(
    "--input",
    "data",
    type=PATH,
    help="For models of sound: a .safetensors file with a tensor for each input of the encoder.",
)
@click.option(
    "--max-new-tokens",
    type=click.IntRange(1),
    default=64,
    show_default=True,
    help="The largest number of tokens to make.",
)
def run(directory: Path, prompt: str | None, data: Path | None, max_new_tokens: int) -> None:
    """Make text with an exported model.

    The model runs in ONNX Runtime, and each token is the most likely one.
    """
    from quantize.export.onnx.runtime.generate_encoded import generate

    for piece in generate(directory, prompt, data, max_new_tokens):
        click.echo(piece, nl=False)
    click.echo()


@click.command()
@click.argument("directory", type=PATH)
@click.option("--digest", help="The digest that the run printed, so that nobody can have changed the manifest as well.")
def verify(directory: Path, digest: str | None) -> None:
    """Check that an artifact is as it was written.

    The hash of every file is checked, the artifact is loaded, and its output is compared with the recorded one.
    """
    from quantize.artifact.verify import verify_artifact

    found = verify_artifact(directory, digest)
    click.echo(
        f"{directory}: {found['files']} files as written, output as recorded (difference {found['difference']:.1e}), "
        f"digest {found['digest']}"
    )


HELP = """Quantize transformers to 4-bit weights and activations with little loss, and check every step.

`quantize-model MODEL --scheme W4A4 --output-dir OUT` quantizes a model; `quantize-model quantize --help` lists its
options.
"""
commands: click.Group = DefaultGroup(
    default="quantize",
    help=HELP,
    commands=[quantize, merge_stats, inspect, evaluate, export, run, verify],
    context_settings={"help_option_names": ["-h", "--help"]},
)
click.version_option(package_name="quantize-model")(commands)


def system_error(error: OSError | MemoryError) -> str:
    """Say what the system refused, such as a file in a place that cannot be written."""
    if isinstance(error, MemoryError):
        return "there is not enough memory; --dry-run says how much a run takes"
    where = f"{error.filename}: " if error.filename else ""
    return f"{where}{error.strerror or reason(error)}; give a place that can be read and written and has room"


def main() -> NoReturn:
    """Run the command. The exit code is 0 when it is done, 1 when it failed, and 2 for wrong use."""
    signals: list[int] = []

    def interrupt(number: int, _: FrameType | None) -> None:
        signals.append(number)
        signal.setitimer(signal.ITIMER_REAL, 0.5)  # a library may swallow the exception: again, until the run has ended
        raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM):
        signal.signal(number, interrupt)
    try:
        commands.main(prog_name="quantize-model", standalone_mode=False)
        sys.exit(0)
    except click.UsageError as error:
        error.show()
        sys.exit(2)
    except (KeyboardInterrupt, Exception) as error:
        kept = getattr(error.__cause__ if isinstance(error, click.Abort) else error, "__notes__", [])
        # a library may have made another error of the interruption
        if not signals and not isinstance(error, KeyboardInterrupt | click.Abort):
            if not isinstance(error, QuantizeError | OSError | MemoryError):
                raise
            told = error if isinstance(error, QuantizeError) else system_error(error)
            click.echo("; ".join([f"error: {told}", *kept]), err=True)
            sys.exit(2 if isinstance(error, UsageError) else 1)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    click.echo("; ".join(["interrupted", *(kept or ["nothing was kept"])]), err=True)
    sys.exit(1)


if __name__ == "__main__":
    main()
