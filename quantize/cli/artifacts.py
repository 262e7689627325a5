"""The commands `quantize-model merge-stats`, `run`, `verify` and `report`."""

from __future__ import annotations

from pathlib import Path

import click

from quantize.checkpoint.outputs import require_new
from quantize.checkpoint.paths import require_artifact, require_file, require_runnable
from quantize.cli.arguments import PATH, TRUST


@click.command("merge-stats")
@click.argument("files", type=PATH, nargs=-1, required=True)
@click.option("--output", type=PATH, required=True, help="The new file that the merged statistics are written to.")
def merge_stats(files: tuple[Path, ...], output: Path) -> None:
    """Merge the files that --collect-stats wrote.

    Each file holds the statistics of a part of the calibration data.
    """
    for file in files:
        require_file(file)
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
    require_runnable(directory)
    from quantize.export.onnx.runtime.generate_encoded import generate

    for piece in generate(directory, prompt, data, max_new_tokens):
        click.echo(piece, nl=False)
    click.echo()


@click.command()
@click.argument("directory", type=PATH)
@click.option("--digest", help="The digest that the run printed, so that nobody can have changed the manifest as well.")
@TRUST
def verify(directory: Path, digest: str | None, trust_remote_code: bool) -> None:
    """Check that an artifact is as it was written.

    The hash of every file is checked, the artifact is loaded, and its output is compared with the recorded one.
    """
    require_artifact(directory)
    from quantize.artifact.verify import verify_artifact

    found = verify_artifact(directory, digest, trust_remote_code)
    if found["difference"] is not None:
        what = f"output as recorded (difference {found['difference']:.1e})"
    elif found["why"]:
        what = f"not loaded, as {found['why']}"
    else:
        what = "every tensor in its place, no output recorded as it was rounded without the model"
    click.echo(f"{directory}: {found['files']} files as written, {what}, digest {found['digest']}")


@click.command()
@click.argument("directory", type=PATH)
@click.option("-o", "--output", type=PATH, help="A new file for the page.  [default: report.html in the artifact]")
def report(directory: Path, output: Path | None) -> None:
    """Write the page that shows what was done to an artifact, and what it cost.

    A run writes it into the artifact already; this makes it again from the manifest.
    """
    require_artifact(directory)
    if output is not None:
        require_new(output)
    from quantize.artifact.report.write import write_page

    click.echo(f"{write_page(directory, output)}: open it in a browser")
