"""An outline describes an artifact, or one that a run will make, without weights; obstacles depend on it alone."""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn

from quantize.artifact.load import read_manifest
from quantize.artifact.quantization_config import linear_scheme
from quantize.artifact.writer import PROBE
from quantize.checkpoint.meta_model import build_bounded
from quantize.checkpoint.model_config import read_config
from quantize.checkpoint.tensor_files import index_tensors
from quantize.errors import QuantizeError, UsageError
from quantize.graph import export
from quantize.graph.program import Program
from quantize.pipeline.estimate.artifact_size import ArtifactEstimate
from quantize.scheme.scheme import Scheme

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


@dataclass(frozen=True)
class Outline:
    """An artifact without its weights.

    Attributes:
        config: the content of the model's `config.json`.
        settings: the artifact's quantization settings.
        skeleton: the float model on the meta device.
        directory: where the tokenizer is; None for a module in memory.
        exported: the model's graph, where it is known already.
    """

    config: dict[str, Any]
    settings: dict[str, Any]
    skeleton: nn.Module
    directory: Path | None = None
    exported: Program | None = None

    @classmethod
    def read(cls, directory: Path) -> Self:
        """Read the outline of a finished artifact.

        Raises:
            UsageError: there is no artifact, or one of a module that transformers does not know.
            QuantizeError: the artifact lists linears that its model does not have.
        """
        manifest = read_manifest(directory)
        settings = manifest["quantization"]
        if not (directory / "config.json").is_file():
            raise UsageError(
                f"{directory} is of a module that transformers does not know, for which there is no export; run it "
                "with quantize.load and a skeleton"
            )
        config = read_config(directory)
        if "remote_code" in manifest:
            raise UsageError(f"{directory} runs with code of the model's own, which no export takes along")
        skeleton = build_bounded(config, index_tensors(directory, PROBE))
        listed = {*settings["modules"], *settings.get("tables", ())}
        places = {path for named in (skeleton.named_modules(), skeleton.named_parameters()) for path, _ in named}
        if missing := listed - places:
            raise QuantizeError(f"{directory} does not fit the model: it lists {min(missing)}, which the model lacks")
        return cls(config, settings, skeleton, directory)

    @classmethod
    def estimate(cls, found: ArtifactEstimate) -> Self:
        """Make the outline of the artifact that a run will write."""
        checkpoint = found.checkpoint
        return cls(checkpoint.config, found.settings, checkpoint.skeleton(), checkpoint.directory, found.program)

    def model_config(self) -> dict[str, Any]:
        """Return the model's config with the defaults of its class, which `config.json` need not have."""
        config: Any = self.skeleton.config
        found: dict[str, Any] = config.to_dict()
        return found

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype in which the config says that weights are stored; float32 if it does not say."""
        told = str(self.config.get("dtype") or self.config.get("torch_dtype"))
        return DTYPES.get(told.removeprefix("torch."), torch.float32)

    @functools.cached_property
    def program(self) -> Program:
        """The model's graph.

        Raises:
            ExportError: the model cannot be exported.
        """
        return self.exported or export.export_program(copy.deepcopy(self.skeleton))

    @property
    def experts(self) -> list[str]:
        """The parameters in whose place quantized experts stand."""
        return [path for path, entry in self.settings["modules"].items() if entry.get("experts") is not None]

    def schemes(self) -> dict[str, Scheme]:
        """Return the scheme of each quantized linear, by path."""
        return {path: linear_scheme(self.settings, path) for path in self.settings["modules"]}
