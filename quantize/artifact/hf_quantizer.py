"""`from_pretrained` of transformers loads an artifact; source: `quantizers/base.py` of transformers 5.24.

Nothing else of this package is imported before a model is loaded, as transformers imports this file halfway through.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from quantize.scheme.names import METHOD

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from quantize.nn.quantized_experts import QuantizedExperts
    from quantize.nn.quantized_linear import QuantizedLinear


class ArtifactConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """The `quantization_config` of an artifact, as it stands in `config.json`."""

    def __init__(self, **settings: Any) -> None:
        self.__dict__.update(settings)
        self.quant_method = METHOD


class ArtifactQuantizer(HfQuantizer):  # type: ignore[misc]
    """Puts quantized linears and experts into a model on the meta device, which transformers then fills.

    Transformers makes garbage of buffers that are never saved and casts all floats to the model's dtype. What must not
    change is therefore read here and put back when all is loaded.
    """

    requires_calibration = True
    is_trainable = False
    is_compileable = True

    def __init__(self, quantization_config: ArtifactConfig, **options: Any) -> None:
        super().__init__(quantization_config, **options)
        self.kept: list[tuple[nn.Module, str, Tensor]] = []
        self.linears: dict[str, QuantizedLinear | QuantizedExperts] = {}
        self.directory: Path | None = None
        self.dtype = torch.float32

    @property
    def settings(self) -> dict[str, Any]:
        """The artifact's quantization settings."""
        return self.quantization_config.to_dict()  # type: ignore[no-any-return]

    def validate_environment(self, *_: Any, device_map: Any = None, **__: Any) -> None:
        """Check the settings and the devices.

        Raises:
            UsageError: a setting is not valid, or modules are to stay on the disk.
        """
        from quantize.artifact.manifest import QuantizationSettings
        from quantize.errors import UsageError
        from quantize.recipe.validation import validated

        validated(lambda: QuantizationSettings(**self.settings), "quantization_config")
        if isinstance(device_map, dict) and "disk" in device_map.values():
            raise UsageError("a quantized model cannot stay on the disk; give a device_map of devices and cpu")

    def is_serializable(self) -> bool:
        """Saving is `save_pretrained` of `artifact/saving.py`, which writes the artifact again."""
        return True

    def update_weight_conversions(self, weight_conversions: list[Any], model: PreTrainedModel) -> list[Any]:
        """Convert nothing, as an artifact has the names and tensors of the model itself."""
        del weight_conversions, model
        return []

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """Keep FP4's scales of 8 bits as they are stored; other floats take the model's dtype."""
        stored = str(param.get_dtype() if hasattr(param, "get_dtype") else param.dtype)
        return None if "8" in stored else super().get_new_dtype(converter, param, dtype)

    def preprocess_model(self, model: nn.Module, dtype: torch.dtype | None = None, **options: Any) -> None:
        """Put quantized linears into the model, whose floats will be of `dtype`."""
        self.dtype = dtype or torch.float32
        super().preprocess_model(model, dtype=dtype, **options)

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **_: Any
    ) -> None:
        from quantize.artifact.load import put_in_place, read_linear, read_table
        from quantize.artifact.writer import PROBE
        from quantize.checkpoint.tensor_files import header_tensor, index_tensors, read_tensor
        from quantize.errors import UsageError
        from quantize.nn.quantized_embedding import quantize_embedding
        from quantize.nn.quantized_experts import QuantizedExperts

        if not checkpoint_files:
            raise UsageError("an artifact is loaded from its files; give from_pretrained a directory or a hub id")
        self.directory, settings = Path(checkpoint_files[0]).parent, self.settings
        files = index_tensors(self.directory, PROBE)
        with torch.device("cpu"):  # transformers has made `meta` the default, where cached matrices would stay empty
            for path, place in places(model, settings["modules"]):
                linear = read_linear(path, settings, files, self.dtype, read=header_tensor)
                put_in_place(model, place, linear)
                self.linears[path] = linear
                self._keep(linear.transform)
                if isinstance(linear, QuantizedExperts):
                    self.kept.append((linear, "computes_in", linear.computes_in))
                if linear.global_scale is not None:
                    name = f"{path}.global_scale"
                    self.kept.append((linear, "global_scale", read_tensor(files[name], name)))
            for path, place in places(model, settings.get("tables", ())):
                if model.get_output_embeddings() is not None and model.config.tie_word_embeddings:
                    raise UsageError(
                        f"{place} is in 8 bits, and {type(model).__name__} ties its head to it; load it without a head"
                    )
                qweight, scale = read_table(path, files, read=header_tensor)
                quantize_embedding(model.get_submodule(place), qweight, scale.to(self.dtype), place)
        if settings.get("prefix") and model.get_output_embeddings() is None:
            raise UsageError("an artifact with a prefix loads as the language model that was quantized, with its head")

    def _keep(self, module: nn.Module) -> None:
        """Note the values of all buffers of a module and its parts."""
        for part in module.modules():
            self.kept += [(part, name, x.clone()) for name, x in part.named_buffers(recurse=False)]

    def _process_model_after_weight_loading(self, model: nn.Module, **_: Any) -> nn.Module:
        from quantize.artifact.saving import saved_again
        from quantize.nn.attention import set_kv_cache
        from quantize.nn.kv_cache import read_kv_cache
        from quantize.nn.prefix_hooks import attach

        for module, name, value in self.kept:
            module.register_buffer(name, value.to(getattr(module, name).device), is_persistent(module, name))
        for path, linear in self.linears.items():
            linear.qtensor().check(path)
            linear.engine = "fake_quant"
        settings = self.settings
        if (cache := read_kv_cache(settings)) is not None:
            set_kv_cache(model, cache)
        if settings.get("prefix"):
            attach(model, settings["prefix"])
        assert self.directory is not None
        saved_again(model, self.directory)
        self.kept.clear()
        return model


def is_persistent(module: nn.Module, name: str) -> bool:
    """Return whether a buffer is saved."""
    return name not in module._non_persistent_buffers_set


def places(model: nn.Module, paths: Any) -> Iterator[tuple[str, str]]:
    """Yield each path of an artifact with its path in a model, which may have a head more or less.

    A part that the model does not have is left out, as the head of a model that is loaded without it.
    """
    prefix = str(getattr(model, "base_model_prefix", ""))
    found = {path for named in (model.named_modules(), model.named_parameters()) for path, _ in named}
    for path in paths:
        candidates = (path, path.removeprefix(f"{prefix}."), f"{prefix}.{path}")
        if (place := next((c for c in candidates if c in found), None)) is not None:
            yield path, place


def register() -> None:
    """Make the artifact's config and quantizer known to transformers; a second time changes nothing."""
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault(METHOD, ArtifactConfig)
    auto.AUTO_QUANTIZER_MAPPING.setdefault(METHOD, ArtifactQuantizer)
