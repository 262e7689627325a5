"""What is measured may be an artifact, a float model, or a checkpoint that another tool has quantized."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from quantize.artifact.load import load
from quantize.checkpoint.model_config import read_config
from quantize.checkpoint.opening import open_checkpoint
from quantize.checkpoint.paths import RUN_IN_TRANSFORMERS, find_measured
from quantize.checkpoint.untrusted_files import check_files, read_json, weight_files
from quantize.errors import UsageError, reason
from quantize.graph.export import quiet
from quantize.scheme.scheme import Engine

METHOD = "compressed-tensors"


def load_any(model: str | Path, engine: Engine = "fake_quant", trust_remote_code: bool = False) -> nn.Module:
    """Load an artifact with an engine, a checkpoint of compressed-tensors as it runs in transformers, or a float model.

    A float model is loaded in float32. It may be one that another tool has quantized, in safetensors or in one GGUF
    file, whose weights become floats.

    With `trust_remote_code` code that an artifact or a float model brings may run.

    Raises:
        UsageError: there is none of these, or transformers cannot load it here.
    """
    directory = find_measured(Path(model)) if Path(model).exists() else Path(model)
    manifest = directory / "manifest.json"
    if manifest.is_file() and read_json(manifest).get("format") not in RUN_IN_TRANSFORMERS:
        return load(directory, engine=engine, trust_remote_code=trust_remote_code)
    if (directory / "config.json").is_file():
        found = read_json(directory / "config.json").get("quantization_config")
        if isinstance(found, dict) and found.get("quant_method") == METHOD:
            return load_quantized(directory, read_config(directory), found)
    return open_checkpoint(directory if directory.exists() else model, trust_remote_code=trust_remote_code).load()


def load_quantized(directory: Path, config: dict[str, Any], settings: dict[str, Any]) -> nn.Module:
    """Load a checkpoint of compressed-tensors as transformers does, from safetensors alone.

    It runs in float32, and in bfloat16 if its values are FP4, which are unpacked to that.

    Raises:
        UsageError: transformers cannot load it.
    """
    check_files(directory)
    weight_files(directory)  # never a file that can hold code
    groups = [x for x in settings.get("config_groups", {}).values() if isinstance(x, dict)]
    weights = [x.get("weights") or {} for x in groups]
    fp4 = any(x.get("type") == "float" and x.get("num_bits") == 4 for x in weights)
    options: dict[str, Any] = {"dtype": torch.bfloat16 if fp4 else torch.float32, "output_loading_info": True}
    if any(x.get("symmetric") is False for x in weights):  # version 0.20 of the package expects other zero points
        options["quantization_config"] = transformers.CompressedTensorsConfig(dequantize=True)
    cls = getattr(transformers, str(config["architectures"][0]), None)
    if cls is None:
        raise UsageError(f"{directory} is of a class that transformers does not have; give another model")
    with quiet():
        try:
            model, told = cls.from_pretrained(directory, local_files_only=True, use_safetensors=True, **options)
        except Exception as error:  # any error of transformers and the packages it uses
            raise UsageError(
                f"{directory} is of {METHOD}, and transformers cannot load it here ({reason(error)}); install that "
                "package (pip install compressed-tensors), or give another model"
            ) from error
    if missing := sorted(told["missing_keys"]):  # transformers has made random numbers of these
        raise UsageError(f"{directory} holds nothing that transformers takes for {missing[0]}; fetch the model anew")
    return model.eval()  # type: ignore[no-any-return]
