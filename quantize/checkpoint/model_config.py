"""The config of a model says what class it is of; one that does not leaves this to the files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers
from torch import nn

from quantize.checkpoint.architecture import name_architecture
from quantize.checkpoint.paths import require_config
from quantize.checkpoint.untrusted_files import read_json
from quantize.errors import UsageError


def config_of(model: nn.Module) -> dict[str, Any]:
    """Return the config of a transformers model with the name of its class; it is empty for any other module."""
    if not isinstance(model, transformers.PreTrainedModel):
        return {}
    return {**model.config.to_dict(), "architectures": [type(model).__name__], "dtype": str(model.dtype).split(".")[-1]}


def read_config(directory: Path, files: Mapping[str, Path] | None = None) -> dict[str, Any]:
    """Read `config.json` as a dict; an architecture that it does not name follows from `files`, tensor name → file."""
    path = require_config(directory)
    config = read_json(path)
    if files is not None and not config.get("architectures"):
        config["architectures"] = [name_architecture(config, files)]
    if not isinstance(config.get("architectures"), list) or not config["architectures"]:
        raise UsageError(f"{path} does not name its architecture; add the key architectures")
    if not isinstance(config.get("model_type", ""), str):
        raise UsageError(f"{path} does not name its model_type")
    return config
