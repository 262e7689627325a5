"""The commands `quantize-model inspect` and `quantize-model eval`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import click
from rich.console import Console, RenderableType

from quantize.checkpoint.paths import find_measured, require_file
from quantize.cli.arguments import PATH, TRUST, require_model
from quantize.errors import UsageError
from quantize.eval.installed import require_lm_eval
from quantize.scheme.names import ENGINES, Engine

T = TypeVar("T")


@click.command()
@click.argument("model")
@click.option("--activations", is_flag=True, help="Show which activations of the float model are massive instead.")
@click.option("--calibration", type=PATH, help="The text that --activations runs on.  [default: bundled prose]")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
@TRUST
def inspect(model: str, activations: bool, calibration: Path | None, as_json: bool, trust_remote_code: bool) -> None:
    """Show where transforms are legal in MODEL.

    Where a transform is not legal, the reason is given.
    """
    require_model(model)
    if calibration is not None and not activations:
        raise UsageError("--calibration is text for --activations; give both or neither")
    from quantize.checkpoint.opening import open_checkpoint
    from quantize.graph.analysis import admissible_bases
    from quantize.graph.fallback.program import make_program

    checkpoint = open_checkpoint(model, trust_remote_code=trust_remote_code)
    program = make_program(checkpoint, checkpoint.skeleton())
    if activations:
        from quantize.eval.activations import activations_table, measure

        return show(measure(checkpoint, program, calibration), activations_table, as_json)
    from quantize.eval.bases_table import bases_table

    if program.export_error and not as_json:
        click.echo(program.export_error_message)
    bases = [basis.as_dict() for basis in admissible_bases(program)]
    show({"export": program.export_record(), "bases": bases}, lambda _: bases_table(bases), as_json)


@click.command("eval")
@click.argument("directory", type=PATH)
@click.option("--against", help="The float model, to measure how far the artifact diverges from it.")
@click.option(
    "--text",
    type=PATH,
    help="The text to measure on: .txt or .jsonl for language models, .tsv with scored pairs of sentences "
    "for encoders.",
)
@click.option(
    "--tasks",
    multiple=True,
    metavar="TASK",
    help="In place of a text: tasks of lm-evaluation-harness, separated by commas, by name or as YAML files. May be "
    "given several times.",
)
@click.option(
    "--nsamples",
    type=click.IntRange(1),
    help="The number of windows, spread evenly over the text, or of a task's documents.  [default: all]",
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
@click.option(
    "--mask-id",
    type=click.IntRange(0),
    help="The mask token of a masked-diffusion language model, scored on what is masked.  [default: the recipe's]",
)
@click.option("--kurtosis", is_flag=True, help="Show instead the kurtosis of the linears' inputs, before and after.")
@click.option(
    "--drift", is_flag=True, help="Show instead how often greedy tokens flip, and how refusals move, beside --against."
)
@click.option(
    "--bit-flips",
    metavar="RATES",
    help="Show instead the loss where these parts of the weights' bits are wrong, as 0,1e-6,1e-5, with and without "
    "clipping.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one flat JSON object instead of a table.")
@TRUST
def evaluate(
    directory: Path,
    against: str | None,
    text: Path | None,
    tasks: tuple[str, ...],
    nsamples: int | None,
    seqlen: int,
    engine: Engine,
    kurtosis: bool,
    drift: bool,
    bit_flips: str | None,
    as_json: bool,
    trust_remote_code: bool,
    mask_id: int | None,
) -> None:
    """Measure a model or an artifact on a text, or on tasks.

    DIRECTORY is an artifact, a model that transformers loads, a checkpoint of compressed-tensors, or a GGUF file beside
    its config.
    """
    if drift and (tasks or kurtosis or mask_id is not None):
        raise UsageError("--drift goes with neither --tasks nor --kurtosis nor --mask-id; give it alone")
    rates = None if bit_flips is None else flip_rates(bit_flips)
    if rates is not None and (text is None or tasks or kurtosis or drift or mask_id is not None):
        raise UsageError("--bit-flips goes with --text FILE, and not with another measurement; give these two")
    if ((text is None) is not bool(tasks) or (kurtosis and text is None)) and not drift:
        raise click.UsageError("eval measures on a text or on tasks; give either --text FILE or --tasks NAMES")
    if (drift or kurtosis) and against is None:
        raise UsageError(f"--{'drift' if drift else 'kurtosis'} compares with the float model; give --against")
    find_measured(directory)
    if against is not None:
        require_model(against)
    names = [name.strip() for given in tasks for name in given.split(",") if name.strip()]
    for file in [Path(name) for name in names if name.endswith((".yaml", ".yml"))] + ([text] if text else []):
        require_file(file)
    if drift and against is not None:
        from quantize.eval.drift import evaluate_drift
        from quantize.eval.report import scores_table

        found = evaluate_drift(directory, against, text, seqlen, nsamples, engine, trust_remote_code)
        show(found, scores_table, as_json)
    elif text is None:
        require_lm_eval()
        from quantize.eval.report import scores_table
        from quantize.eval.tasks import evaluate_tasks

        show(evaluate_tasks(directory, against, names, nsamples, engine), scores_table, as_json)
    elif rates is not None:
        from quantize.eval.bit_flips import flip_campaign, flips_table

        rows = flip_campaign(directory, text, rates, against, seqlen, nsamples, engine, trust_remote_code)
        show(rows, flips_table, as_json)
    elif kurtosis and against is not None:
        from quantize.eval.report import kurtosis_report

        Console().print(kurtosis_report(directory, against, text, seqlen))
    else:
        from quantize.eval.report import evaluate as measure
        from quantize.eval.report import scores_table

        scores = measure(directory, text, against, seqlen, nsamples, engine, trust_remote_code, mask_id)
        show(scores, scores_table, as_json)


def show(found: T, table: Callable[[T], RenderableType], as_json: bool) -> None:
    """Print what was measured, as JSON or as a table."""
    if as_json:
        click.echo(json.dumps(found, indent=2))
    else:
        Console().print(table(found))


def flip_rates(given: str) -> list[float]:
    """Return the numbers of a list with commas.

    Raises:
        UsageError: one is no number from 0 to 0.01, beyond which hardly a weight is what it was.
    """
    try:
        rates = [float(part) for part in given.split(",")]
    except ValueError:
        rates = [-1.0]
    if not all(0 <= rate <= 0.01 for rate in rates):
        raise UsageError(f"--bit-flips takes numbers from 0 to 0.01 separated by commas, and {given!r} is no such list")
    return rates
