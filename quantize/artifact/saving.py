"""A loaded model is saved by writing its artifact again, because its tensors alone are no artifact."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from quantize.artifact.writer import PROBE
from quantize.checkpoint.tensor_files import index_tensors, read_tensor
from quantize.errors import UsageError


def saved_again(model: nn.Module, directory: Path) -> None:
    """Let `save_pretrained` of a model that was loaded from an artifact write that artifact again."""
    model.__dict__["save_pretrained"] = SaveAgain(model, directory)


@dataclass(frozen=True)
class SaveAgain:
    """The `save_pretrained` of a loaded model; copies of the model take one of their own along."""

    model: nn.Module
    source: Path

    def __call__(self, save_directory: str | Path, **options: Any) -> None:
        """Write the artifact again, as `save_pretrained` below does."""
        save_pretrained(self.model, save_directory, source=self.source, **options)


def save_pretrained(model: nn.Module, save_directory: str | Path, *, source: Path, **options: Any) -> None:
    """Copy the artifact, if the model still is what it holds.

    Raises:
        UsageError: the artifact is gone, the model was changed, or the directory is not empty.
    """
    output = Path(save_directory)
    if options.get("push_to_hub"):
        raise UsageError("save_pretrained writes a directory; upload that with `hf upload`")
    if not (source / "manifest.json").is_file():
        raise UsageError(f"{source}, which the model was loaded from, is gone; quantize again, or keep the artifact")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UsageError(f"{output} is not empty; give save_pretrained a new directory, or copy {source}")
    if (name := changed(model, source)) is not None:
        raise UsageError(
            f"{name} is not what {source} holds, and a changed model is no artifact; save what you changed, as an "
            "adapter is, and quantize the float model again"
        )
    shutil.copytree(source, output, dirs_exist_ok=True)


def changed(model: nn.Module, source: Path) -> str | None:
    """Return the name of the first tensor that differs from the artifact's, or None."""
    files, state = index_tensors(source, PROBE), model.state_dict()
    prefix = str(getattr(model, "base_model_prefix", ""))
    for name, file in files.items():
        here = next((n for n in (name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}") if n in state), None)
        if here is None:
            continue
        stored, held = read_tensor(file, name), state[here].cpu()
        if stored.shape != held.shape or not torch.equal(stored.to(held.dtype), held):
            return here
    return None
