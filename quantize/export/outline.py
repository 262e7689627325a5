"""What an artifact is, or what a run that has not begun will make, without weights: what obstacles depend on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn

from quantize.artifact.load import read_manifest
from quantize.artifact.quantization_config import linear_scheme
from quantize.artifact.writer import PROBE
from quantize.checkpoint.checkpoint import read_config
from quantize.checkpoint.meta_model import build_skeleton
from quantize.checkpoint.size_limits import limit_parameters
from quantize.checkpoint.tensor_files import index_tensors
from quantize.errors import QuantizeError
from quantize.pipeline.estimate.artifact_size import ArtifactEstimate
from quantize.scheme.scheme import Scheme

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


@dataclass(frozen=True)
class Outline:
    """An artifact without its weights.

    Attributes:
        config: of its model, as `config.json` has it.
        settings: its quantization settings.
        skeleton: the float model that it was, on the meta device.
    """

    config: dict[str, Any]
    settings: dict[str, Any]
    skeleton: nn.Module

    @classmethod
    def read(cls, directory: Path) -> Self:
        """Of a finished artifact.

        Raises:
            UsageError: no artifact, or one of a module that transformers does not know.
            QuantizeError: it lists linears that its model does not have.
        """
        settings, config = read_manifest(directory)["quantization"], read_config(directory)
        with limit_parameters(index_tensors(directory, PROBE)):
            skeleton = build_skeleton(config)
        if missing := settings["modules"].keys() - {path for path, _ in skeleton.named_modules()}:
            raise QuantizeError(f"{directory} does not fit the model: it lists {min(missing)}, which the model lacks")
        return cls(config, settings, skeleton)

    @classmethod
    def estimate(cls, found: ArtifactEstimate) -> Self:
        """Of the artifact that a run will write."""
        return cls(found.checkpoint.config, found.settings, found.checkpoint.skeleton())

    @property
    def dtype(self) -> torch.dtype:
        """What the config says that weights are stored in; float32 where it does not."""
        told = str(self.config.get("dtype") or self.config.get("torch_dtype"))
        return DTYPES.get(told.removeprefix("torch."), torch.float32)

    def schemes(self) -> dict[str, Scheme]:
        """What each quantized linear is quantized to, by path."""
        return {path: linear_scheme(self.settings, path) for path in self.settings["modules"]}
