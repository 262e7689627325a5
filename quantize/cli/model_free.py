"""`quantize-model quantize --model-free`: weights are rounded without the model's code."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from quantize.errors import UsageError
from quantize.recipe.targets import TARGETS

OWN = ("group_size", "ignore", "requantize")  # options that keep their meaning
FORMATS = ("compressed-tensors", "artifact", "gguf")
DEFAULTS = {"device": "cpu", "trust_remote_code": False, "force": False}  # those of other options that are not None


def rounded_alone(given: Mapping[str, Any], target: str | None, format: str | None, **known: Any) -> dict[str, Any]:
    """Return the arguments of `quantize_model_free`, from those of the command.

    Args:
        given: the options that may need the model.
        target: the runtime that is to read the result.
        format: what is written; None leaves it to the target, and without one it is compressed-tensors.
        known: arguments that are passed on.

    Raises:
        UsageError: an option needs the model, or the target does not read the format.
    """
    if others := [name for name, value in given.items() if name not in OWN and value != DEFAULTS.get(name)]:
        raise UsageError(f"--{others[0].replace('_', '-')} needs the model; leave it or --model-free out")
    read = None if target is None else TARGETS[target].format
    if read is not None and (read not in FORMATS or format not in (None, read)):
        written = format or f"{', '.join(FORMATS[:-1])} and {FORMATS[-1]}"
        raise UsageError(f"--model-free writes {written}, which {target} does not read; leave --target out")
    return known | {"format": format or read or FORMATS[0], "target": target} | {name: given[name] for name in OWN}


def run_model_free(model: str, output_dir: Path | None, call: dict[str, Any], progress: str, quiet: bool) -> None:
    """Round a checkpoint without the model; without an output say what that would do.

    Args:
        model, output_dir, progress, quiet: as the command has them.
        call: the other arguments of `quantize_model_free`.
    """
    from quantize.checkpoint.remote_shards import headers_alone
    from quantize.export.model_free.plan import recipe_without_model
    from quantize.export.model_free.quantize import form_of, plan_for, quantize_model_free
    from quantize.pipeline.progress import JsonConsole

    program = JsonConsole() if progress == "json" else None
    say = click.echo if program is None else program.print
    if output_dir is None:
        form = form_of(call["format"])
        recipe = recipe_without_model(
            form, *(call[name] for name in ("scheme", "recipe", "target")), **{name: call[name] for name in OWN}
        )
        with headers_alone(model, call["low_disk"]) as source:
            return say(plan_for(form, source, recipe).describe())
    console = None if quiet else program or Console(stderr=True)
    found = quantize_model_free(model, output_dir=output_dir, console=console, **call)
    if program is not None:
        return program.event("done", **found.record())
    return click.echo(f"{found.summary()}\ndigest {found.manifest['digest']}")
