"""Code that a model brings runs only where a person asks for it, after a line that names its files."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from quantize.errors import UsageError, reason, shown

LOG = logging.getLogger(__name__)


def own_class_name(config: Mapping[str, Any]) -> str | None:
    """Return `MODULE.CLASS` of the class that a config says its directory defines; None if it names none.

    It is that of the architecture, or the only model of `auto_map` where none has its name.

    Args:
        config: the content of a `config.json`, whose `auto_map` maps classes of transformers to such names.
    """
    table, name = config.get("auto_map"), str(config["architectures"][0])
    found = {key: value for key, value in table.items() if isinstance(value, str)} if isinstance(table, dict) else {}
    models = sorted({value for key, value in found.items() if key.startswith("AutoModel")})
    named = [value for value in found.values() if value.rpartition(".")[2] == name]
    return next(iter(named or models), None) if named or len(models) == 1 else None


def code_files(directory: Path) -> list[Path]:
    """Return the files of code beside a model's weights, sorted."""
    return sorted(path for path in directory.glob("*.py") if path.is_file())


def own_class(directory: Path, reference: str) -> type[transformers.PreTrainedModel]:
    """Run the code of a directory and return the class of a model that it defines.

    Args:
        directory: the directory; code on the hub that it refers to is not fetched.
        reference: what `own_class_name` found.

    Raises:
        UsageError: the code does not run, is elsewhere, or defines no such class.
    """
    names = [path.name for path in code_files(directory)]
    module, _, name = reference.rpartition(".")
    if f"{module}.py" not in names:
        raise UsageError(f"{directory} has no {shown(f'{module}.py')}, where its config says {shown(name)} is")
    LOG.warning("running code that %s brings: %s", directory, ", ".join(names))
    try:
        found = get_class_from_dynamic_module(reference, str(directory), local_files_only=True)
    except Exception as error:  # code of other authors may raise anything
        raise UsageError(f"the code that {directory} brings does not run ({reason(error)})") from error
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
        raise UsageError(f"{reference} of {directory} is no model of transformers")
    return found
