"""Where a model's config says that and how its weights are quantized, and in which dtype the model computes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from quantize.checkpoint.safetensors_reader import DTYPES
from quantize.checkpoint.sources.encoded import Entries
from quantize.checkpoint.untrusted_files import read_json

KEYS = ("quantization_config", "compression_config")  # the second one is what compressed-tensors wrote first
MODELOPT = "hf_quant_config.json"
SETTINGS_FILES = {MODELOPT, "quantize_config.json", "quant_config.json"}  # of ModelOpt, GPTQ and AWQ
FLOATS = {"F32", "F16", "BF16"}


def split_settings(config: Mapping[str, Any], directory: Path) -> tuple[dict[str, Any], Any]:
    """Return a config without its quantization settings, and the settings; None if there are none.

    Models of several parts may have them in the config of one part, and ModelOpt in a file beside the config.
    """
    rest, settings = {key: x for key, x in config.items() if key not in KEYS}, [config[k] for k in KEYS if k in config]
    for part, inner in rest.items():
        if isinstance(inner, dict) and any(key in inner for key in KEYS):
            settings += [inner[key] for key in KEYS if key in inner]
            rest[part] = {key: x for key, x in inner.items() if key not in KEYS}
    if not settings and (directory / MODELOPT).is_file():
        settings = [{"quant_method": "modelopt", **read_json(directory / MODELOPT)}]
    return rest, next((found for found in settings if found is not None), None)


def float_dtype(config: Mapping[str, Any], entries: Entries) -> torch.dtype:
    """Return the dtype that a config names for the model's weights, or else that of most floats in the files."""
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    for name in (part.get(key) for part in parts for key in ("dtype", "torch_dtype")):
        found = getattr(torch, name.removeprefix("torch."), None) if isinstance(name, str) else None
        if found in {DTYPES[known] for known in FLOATS}:
            return found  # type: ignore[no-any-return]
    stored = Counter(entry.dtype for entry in entries.values() if entry.dtype in FLOATS)
    return DTYPES[stored.most_common(1)[0][0]] if stored else torch.bfloat16
