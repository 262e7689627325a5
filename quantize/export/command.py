"""The command `export` has the choices, options and help texts of the registered targets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource
from rich.console import Console

from quantize.checkpoint.outputs import require_new
from quantize.checkpoint.paths import require_artifact
from quantize.errors import own_words_shown
from quantize.export import EXPORTERS

RELATIVE = {  # what differences that are relative to outputs or weights are called on the last line
    "tensors": "weights",
    "steps": "weights, in steps",
    "reference": "outputs",
    "emulation": "the same operators in torch",
    "rounding": "the artifact with its weights in the file's type",
    "activations": "the artifact without rounded activations",
}
JUDGED = ("kl", "top1")  # where these are measured, the relative distances are in the manifest alone


class ExportCommand(click.Command):
    """A command with the options of all targets; its help lists them by target."""

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """Return the command's own parameters, `--format`, and the targets' options, each of which is declared once."""
        format_ = click.Option(
            ["--format", "target"], type=click.Choice(sorted(EXPORTERS)), default="onnx", show_default=True
        )
        options = {option.name: option for exporter in EXPORTERS.values() for option in exporter.options}
        argument, *own = super().get_params(ctx)
        return [argument, format_, *own, *options.values()]

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options for every target, then each target with its own options."""
        special = {option.name for exporter in EXPORTERS.values() for option in exporter.options}
        common = [p for p in self.get_params(ctx) if isinstance(p, click.Option) and p.name not in special]
        with formatter.section("Options"):
            formatter.write_dl([record for p in common if (record := p.get_help_record(ctx))])
        for name, exporter in sorted(EXPORTERS.items()):
            with formatter.section(f"Format {name}"):
                formatter.write_text(exporter.summary)
                if own := [record for o in exporter.options if (record := o.get_help_record(ctx))]:
                    formatter.write_dl(own)


@click.command(cls=ExportCommand)
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("-o", "--output-dir", type=click.Path(path_type=Path), required=True, help="The new directory to write.")
@click.option("-v", "--verbose", is_flag=True, help="Show what other libraries say where something fails.")
@click.pass_context
def export(
    ctx: click.Context, /, directory: Path, target: str, output_dir: Path, verbose: bool, **options: Any
) -> None:
    """Write an artifact for another runtime, and compare the two."""
    require_artifact(directory)
    require_new(output_dir)
    from quantize.export.directory import export_artifact

    given = {name: x for name, x in options.items() if ctx.get_parameter_source(name) != ParameterSource.DEFAULT}
    with own_words_shown(verbose):
        parity = export_artifact(directory, target, output_dir, Console(stderr=True), **given)
    figures = [f"{name} {parity[name]:.4f}" for name in JUDGED if name in parity]
    if not figures:
        shown = {RELATIVE.get(name, name): x if isinstance(x, str) else f"{x:.1e}" for name, x in parity.items()}
        measured = any(not isinstance(x, str) for x in parity.values())
        words = "relative differences from the artifact: " if measured else ""
        figures = [words + ", ".join(f"{name} {x}" for name, x in shown.items())]
    click.echo(f"{output_dir}: {', '.join(figures)}")
