"""Arguments of the command are converted and checked before anything slow is imported."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import click

from quantize.checkpoint.hub import require_on_hub
from quantize.checkpoint.module_names import possible_parts
from quantize.checkpoint.outputs import require_new, require_resumable
from quantize.checkpoint.paths import LARGEST_JSON, find_model, folder_of, glance, require_data
from quantize.errors import UsageError
from quantize.recipe.fit import check_length, check_methods, check_patterns
from quantize.recipe.merging import check_fields
from quantize.recipe.patterns import split_patterns
from quantize.scheme.names import SCHEME_NAMES, scheme_name

PATH = click.Path(path_type=Path)


TRUST = click.option(
    "--trust-remote-code", is_flag=True, help="Run code of the model's own, if transformers has no class for it."
)


class SchemeType(click.Choice[str]):
    """A scheme's name in any case, or a common name such as `int4`."""

    def __init__(self) -> None:
        super().__init__(SCHEME_NAMES)

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return the name as this package writes it."""
        return super().convert(scheme_name(value), param, ctx)


def on_hub(model: str, revision: str) -> str:
    """Return the name of a revision of a model on the hub.

    Raises:
        UsageError: the model lies in a directory.
    """
    if Path(model).exists():
        raise UsageError(f"{model} is not on the hub, so it has no revision {revision}")
    return f"{model}@{revision}"


def require_model(model: str) -> None:
    """Check that there is a model, here or on the hub.

    Raises:
        UsageError: there is none.
    """
    if find_model(model) is None:
        require_on_hub(*model.split("@"))


def check_run(model: str, calibration: Path | None, output: Path | None, resume: bool = False) -> None:
    """Check the paths of a run without importing torch.

    Raises:
        UsageError: a path does not exist, the output exists, or the run to go on with is finished.
    """
    find_model(model)
    if calibration is not None:
        require_data(calibration)
    if output is not None:
        (require_resumable if resume else require_new)(output)
    require_model(model)


def check_recipe(
    model: str,
    scheme: str | None,
    target: str | None,
    recipe: Path | None,
    seqlen: int | None,
    ignore: Iterable[str],
    model_free: bool = False,
) -> None:
    """Check what can be checked of a run's recipe, and of how it fits the model's files, without importing torch.

    Raises:
        UsageError: the recipe cannot be read, has a wrong key, or names what does not exist; the target cannot execute
            the scheme; windows are longer than the model's positions; or a pattern cannot match.
    """
    given = check_fields(scheme, recipe, target)
    check_methods(given)
    update: dict[str, object] = {"ignore_also": (*given.ignore_also, *split_patterns(ignore))}
    given = given.model_copy(update=update if seqlen is None else update | {"seqlen": seqlen})
    place = None if model_free else find_model(model)
    if place is not None:
        check_length(glance(folder_of(place) / "config.json", LARGEST_JSON), given)
    check_patterns(given, *(possible_parts(place) if place else (set(), set())))
