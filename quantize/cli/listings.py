"""The commands `quantize-model recipes`, `schemes` and `completion` say what there is to choose from."""

from __future__ import annotations

import tomllib

import click
from click.shell_completion import get_completion_class

from quantize.recipe.shipped import about, names, shipped
from quantize.recipe.targets import TARGETS
from quantize.scheme.names import COMMON_NAMES, SCHEME_NAMES


@click.command()
def recipes() -> None:
    """List the recipes that come with the package."""
    widest = max(map(len, names()))
    for name in names():
        click.echo(f"{name:{widest}}  {tomllib.loads(shipped(name))['scheme']:5}  {about(name)}")


@click.command()
def schemes() -> None:
    """List the schemes: bits of weights and activations, columns that share a scale, and who executes them."""
    click.echo(f"{'scheme':6}  {'weights':8}  {'activations':11}  {'group':5}  runs in a loaded model and in")
    for name in SCHEME_NAMES:
        default = tomllib.loads(shipped(name.lower()))
        weights, activations = (entry(default.get(table)) for table in ("weights", "activations"))
        others = ", ".join(target for target, found in sorted(TARGETS.items()) if name not in found.refused)
        also = " or ".join(common.lower() for common, scheme in COMMON_NAMES.items() if scheme == name)
        group = default["weights"]["group_size"] or "row"
        click.echo(
            f"{name:6}  {weights:8}  {activations:11}  {group!s:5}  {others}"
            + (f"; also called {also}" if also else "")
        )


def entry(table: dict[str, object] | None) -> str:
    """Return what a table of a recipe says of its values: `int4`, `mxfp4`, or `float`."""
    if table is None:
        return "float"
    return str(table["format"]) if "format" in table else f"int{table['num_bits']}"


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print what lets SHELL complete this command: `eval "$(quantize-model completion bash)"`."""
    found = get_completion_class(shell)
    assert found is not None
    click.echo(found(ctx.find_root().command, {}, "quantize-model", "_QUANTIZE_MODEL_COMPLETE").source())
