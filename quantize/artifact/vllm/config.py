"""The `quantization_config` of an artifact as vLLM asks it for the method of each layer; source: vLLM 0.32."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.models.utils import WeightsMapper

from quantize.artifact.manifest import Entry, QuantizationSettings
from quantize.artifact.vllm.layers import cache_note, linears_of, require_one_weight, require_served
from quantize.artifact.vllm.linear import ArtifactLinearMethod, QuantizedPart
from quantize.artifact.vllm.table import ArtifactTableMethod
from quantize.artifact.writer import PROBE
from quantize.checkpoint.tensor_files import header_tensor, index_tensors
from quantize.errors import UsageError
from quantize.recipe.validation import validated
from quantize.scheme.names import METHOD

LOG = init_logger(f"vllm.{__name__}")


class ArtifactConfig(QuantizationConfig):  # type: ignore[misc]
    """The settings of an artifact, and which of its files holds which tensor.

    Attributes:
        entries: path in vLLM → the quantized linear there.
        stored: path in vLLM → path in the artifact.
        tables: the paths in vLLM of tables of words in 8 bits.
    """

    def __init__(self, settings: QuantizationSettings) -> None:
        super().__init__()
        require_served(settings)
        self.settings, self.files = settings, dict[str, Path]()
        self.entries: dict[str, Entry] = dict(settings.modules)
        self.stored = {path: path for path in settings.modules}
        self.tables = list(settings.tables)
        if settings.kv_cache:
            LOG.warning(cache_note(settings.kv_cache))

    def get_name(self) -> str:
        """Return what `quant_method` is in `config.json`."""
        return METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Return the dtypes that the kernels take."""
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Return the capability of the first GPUs that the kernels are compiled for."""
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        """Return no name, as all settings stand in `config.json`."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> ArtifactConfig:
        """Check the settings.

        Raises:
            UsageError: one is not valid, or vLLM has no place for it.
        """
        return cls(validated(lambda: QuantizationSettings(**config), "quantization_config"))

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Look up the tensors of the artifact, a directory or a model of the hub."""
        del hf_config
        directory = Path(model_name)
        if not directory.is_dir():
            patterns = ["*.json", "*.safetensors"]
            directory = Path(snapshot_download(model_name, revision=revision, allow_patterns=patterns))
        self.files = index_tensors(directory, PROBE)

    def apply_vllm_mapper(self, hf_to_vllm_mapper: WeightsMapper) -> None:
        """Take the names that the model's class in vLLM has for the artifact's."""
        self.entries = hf_to_vllm_mapper.apply_dict(self.entries)
        self.stored = hf_to_vllm_mapper.apply_dict(self.stored)
        self.tables = hf_to_vllm_mapper.apply_list(self.tables)

    @staticmethod
    def get_checkpoint_weight_mapper() -> WeightsMapper:
        """Leave out the tensors of online transforms, which `ArtifactLinearMethod` reads."""
        return WeightsMapper(orig_to_new_regex={re.compile(r"\.transform\.\d+\.\w+$"): None})

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """Return how a layer multiplies or looks up, None if as floats.

        Raises:
            UsageError: the linears that vLLM holds as one do not fit together, or vLLM lacks a bias that one has.
        """
        if isinstance(layer, VocabParallelEmbedding) and not isinstance(layer, ParallelLMHead):
            return ArtifactTableMethod() if self.holds_table(layer, prefix) else None
        if not isinstance(layer, LinearBase | ParallelLMHead):
            return None
        paths = linears_of(prefix, self.packed_modules_mapping, self.entries)
        if not paths:
            return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None
        parts = [self.part(path) for path in paths]
        require_one_weight({part.path: part.scheme for part in parts})
        if not layer.has_bias and (biased := [part.path for part in parts if f"{part.path}.bias" in self.files]):
            raise UsageError(
                f"{biased[0]} has a bias in the artifact and none in vLLM's {type(layer).__name__}; leave out the pass "
                "that adds it"
            )
        return ArtifactLinearMethod(parts, self.files)

    def holds_table(self, layer: VocabParallelEmbedding, prefix: str) -> bool:
        """Return whether a table of words is in 8 bits; a layer without a name is known by its shape."""
        shapes = [
            header_tensor(self.files[name], name).shape for name in map("{}.qweight".format, self.settings.tables)
        ]
        return prefix in self.tables if prefix else (layer.org_vocab_size, layer.embedding_dim) in shapes

    def part(self, path: str) -> QuantizedPart:
        """Return the quantized linear at a path in vLLM."""
        entry = self.entries[path]
        return QuantizedPart(self.stored[path], entry, entry.scheme or self.settings.scheme)
