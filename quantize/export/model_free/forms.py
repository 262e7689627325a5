"""What a run without the model can write, and how a rounded weight is stored in it."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from quantize.checkpoint.checkpoint import Checkpoint
from quantize.checkpoint.meta_model import build_on_meta, native_class
from quantize.checkpoint.model_config import read_config
from quantize.checkpoint.opening import as_floats, open_checkpoint, open_files
from quantize.checkpoint.remote_shards import RemoteShards
from quantize.checkpoint.sources.gguf import SUFFIX
from quantize.errors import UsageError
from quantize.export.compressed_tensors.format import NAME as COMPRESSED_TENSORS
from quantize.export.compressed_tensors.format import is_packed, stored
from quantize.formats.qtensor import QTensor
from quantize.scheme.scheme import Scheme

ARTIFACT, GGUF = "artifact", "gguf"


@dataclass(frozen=True)
class Form:
    """One of the forms that a result can have.

    Attributes:
        name: the value of `--format`.
        target: the runtime whose recipes hold where none is asked for; None for the schemes' default recipes.
        is_artifact: whether weights are stored as in an artifact, under the names that the model has for them.
    """

    name: str
    target: str | None
    is_artifact: bool

    def parts(self, weight: QTensor, scheme: Scheme) -> dict[str, Tensor]:
        """Return the tensors that a rounded weight is stored as, by the ends of their names."""
        return weight.tensors() if self.is_artifact else stored(weight, is_packed(scheme))


# Recipes for transformers clip nothing, and but for W3A16 have no zero points: every reader of the format knows them.
FORMS = {
    COMPRESSED_TENSORS: Form(COMPRESSED_TENSORS, "transformers", is_artifact=False),
    ARTIFACT: Form(ARTIFACT, None, is_artifact=True),
    GGUF: Form(GGUF, "llama.cpp", is_artifact=True),
}


@dataclass(frozen=True)
class Opened:
    """A model's files, and its class if transformers has it.

    Attributes:
        checkpoint: the files. Of a class that is known tensors have its names, if an artifact is to be written.
        model: the class without weights; None if transformers has none, or it cannot be built.
    """

    checkpoint: Checkpoint
    model: nn.Module | None = None


def open_for(form: Form, source: str | Path | RemoteShards) -> Opened:
    """Open a model's files, by the names of its class if that is known and the form has such names.

    Raises:
        UsageError: there is no such model, or it is quantized by a method that cannot be read.
        QuantizeError: the files are damaged.
    """
    files = open_files(source)
    assert files.directory is not None
    opened = Opened(files)
    with contextlib.suppress(UsageError):  # what has no class, or a config that does not fit it, is read by its files
        config = read_config(files.directory, as_floats(files.files, files.encoded))
        if native_class(config) is not None:
            named = open_checkpoint(source) if form.is_artifact else files
            opened = Opened(named, build_on_meta(named.config if form.is_artifact else config, files.files))
    if any(path.suffix == SUFFIX for path in files.files.values()) and (not form.is_artifact or opened.model is None):
        raise UsageError(
            f"{source} is a GGUF file, whose names only a class of transformers tells; give --format {ARTIFACT} or "
            f"{GGUF} for a model that has one, or leave --model-free out"
        )
    return opened
