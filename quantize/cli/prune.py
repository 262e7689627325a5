"""The command `quantize-model prune`."""

from __future__ import annotations

from pathlib import Path

import click
from rich.console import Console

from quantize.cli.arguments import PATH, check_recipe, check_run


@click.command()
@click.argument("model")
@click.option(
    "--ratio",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    required=True,
    help="The part of the experts of each layer to drop.",
)
@click.option(
    "-o", "--output-dir", type=PATH, required=True, help="The new directory for the float model that is left."
)
@click.option(
    "--calibration",
    type=PATH,
    help="The data that tell which experts add the least, as for quantize.  [default: bundled prose]",
)
@click.option("--nsamples", type=click.IntRange(1), help="The number of calibration windows.  [default: 128]")
@click.option("--seqlen", type=click.IntRange(2), help="The number of tokens in a window.  [default: 512]")
@click.option("-q", "--quiet", is_flag=True, help="Show no progress.")
def prune(
    model: str,
    ratio: float,
    output_dir: Path,
    calibration: Path | None,
    nsamples: int | None,
    seqlen: int | None,
    quiet: bool,
) -> None:
    """Drop experts of MODEL, a mixture of experts, and write what is left in floating point.

    Those go that add the least to the output of their layer (REAP), as many in each layer. The table prune of a recipe
    does the same before a model is quantized.
    """
    check_run(model, calibration, output_dir)
    check_recipe(model, "W4A16", None, None, seqlen, ())
    from quantize.pipeline.pruned_model import prune_model

    found = prune_model(
        model, output_dir=output_dir, ratio=ratio, calibration=calibration, nsamples=nsamples, seqlen=seqlen,
        console=None if quiet else Console(stderr=True),
    )  # fmt: skip
    click.echo(f"{found.summary()}\nnext: quantize-model {output_dir} --scheme W4A16 --output-dir OUT")
