"""An exported directory is opened: its settings are checked once, and its files run in ONNX Runtime."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, TypeVar

import onnxruntime
from pydantic import BaseModel, Field, NonNegativeInt, PositiveInt

from quantize.checkpoint.untrusted_files import read_json
from quantize.errors import QuantizeError, UsageError, reason
from quantize.export.onnx.parity import open_session
from quantize.export.onnx.runtime.saturation import has_exact_int8_gemm
from quantize.recipe.validation import validated

Entries = dict[Literal["session.x64quantprecision", "session.qdq_matmulnbits_accuracy_level"], str]
Settings = TypeVar("Settings", bound=BaseModel)


class SessionConfig(BaseModel):
    """What is read of `ort_config.json`: session options, and those that are better where products are exact."""

    session_config_entries: Entries = Field(default_factory=dict)
    with_vnni: Entries = Field(default_factory=dict)


class GenerationConfig(BaseModel):
    """What is read of `config.json` and `generation_config.json`; the first known number of positions counts."""

    max_position_embeddings: PositiveInt | None = None
    n_positions: PositiveInt | None = None
    max_target_positions: PositiveInt | None = None
    eos_token_id: NonNegativeInt | list[NonNegativeInt] | None = None
    decoder_start_token_id: NonNegativeInt | None = None

    @property
    def positions(self) -> int:
        """The number of tokens that the model distinguishes."""
        return self.max_position_embeddings or self.n_positions or self.max_target_positions or 2**31

    @property
    def ends(self) -> set[int]:
        """The tokens that end a text."""
        given = [] if self.eos_token_id is None else self.eos_token_id
        return set(given) if isinstance(given, list) else {given}


def generation_config(directory: Path) -> GenerationConfig:
    """Read what an exported directory says of its texts; `config.json` counts where both files say something."""
    return read(GenerationConfig, directory / "generation_config.json", directory / "config.json")


def read(settings: type[Settings], *paths: Path) -> Settings:
    """Read JSON objects as one, later ones over earlier ones, and check them; a missing one is {}.

    Raises:
        UsageError: a value is of another kind; the message names the key.
        QuantizeError: a file is no JSON object.
    """
    found = {key: value for path in paths if path.is_file() for key, value in read_json(path).items()}
    return validated(lambda: settings.model_validate(found, strict=True), " and ".join(map(str, paths)))


@contextlib.contextmanager
def running(path: Path) -> Iterator[None]:
    """Turn whatever ONNX Runtime and numpy raise about a file's graph into one sentence."""
    try:
        yield
    except QuantizeError:
        raise
    except Exception as error:
        raise QuantizeError(f"{path} does not run in ONNX Runtime: {reason(error)}; export the model anew") from None


def session_of(directory: Path, file: str = "model.onnx") -> onnxruntime.InferenceSession:
    """Open a file of a directory with the session options that are stored beside it.

    Raises:
        UsageError: there is no such file.
        QuantizeError: ONNX Runtime cannot load it.
    """
    path = directory / file
    if not path.is_file():
        raise UsageError(f"{directory} holds no {file}; write one with `quantize-model export --format onnx`")
    config = read(SessionConfig, directory / "ort_config.json")
    entries = config.session_config_entries | (config.with_vnni if has_exact_int8_gemm() else {})
    try:
        return open_session(path, {str(name): value for name, value in entries.items()})
    except Exception as error:  # of onnxruntime's own classes
        raise QuantizeError(f"ONNX Runtime cannot load {path}: {reason(error)}") from None
