"""A fingerprint names what an artifact depends on, as hashes: the model, the recipe, the data and the code."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import platform
import re
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor, nn

from quantize.calibration.data import Samples
from quantize.calibration.precision import bfloat16_unit
from quantize.checkpoint.checkpoint import Checkpoint
from quantize.checkpoint.files_seen import FilesSeen, sha256
from quantize.recipe.recipe import Recipe

Fingerprint = dict[str, dict[str, str]]  # part → name in that part → hash, or the value itself
PACKAGE = Path(__file__).parents[1]
SOURCES = {".py", ".toml"}
MACHINE = "machine"
NVIDIA = Path("/proc/driver/nvidia/version")


def identity(checkpoint: Checkpoint, graph: str, recipe: Recipe, samples: Samples, device: torch.device) -> Fingerprint:
    """Return the fingerprint of all that an artifact's bytes depend on; every file of the model is read once.

    Args:
        checkpoint: the model.
        graph: the graph of the program as text, the only record of what a module in memory computes.
        recipe: the resolved recipe.
        samples: the calibration data.
        device: where the run computes.
    """
    in_memory = checkpoint.module is not None
    return {
        "model": module_hashes(checkpoint, graph) if in_memory else file_hashes(checkpoint),
        "recipe": {name: json.dumps(value) for name, value in recipe.model_dump(mode="json").items()},
        "data": {"calibration": samples.sha256},
        "code": {**versions(), "sources": sources_hash()},
        MACHINE: machine(device),
    }


def diff_fingerprints(before: Fingerprint, after: Fingerprint) -> list[str]:
    """Return what differs, in words such as `the recipe (seed, passes)`."""
    found = []
    for part in after:
        old, new = before.get(part, {}), after[part]
        names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
        found += [f"the {part} ({', '.join(names)})"] if names else []
    return found


def file_hashes(checkpoint: Checkpoint) -> dict[str, str]:
    """Return the SHA-256 of the weights, the config and the other files that the artifact copies."""
    assert checkpoint.directory is not None
    paths = sorted(checkpoint.seen.stamps)
    found = {str(path.relative_to(checkpoint.directory)): checkpoint.seen.sha256(path) for path in paths}
    adapter = checkpoint.adapter.seen if checkpoint.adapter else FilesSeen()
    return found | {f"adapter: {path.name}": adapter.sha256(path) for path in sorted(adapter.stamps)}


def module_hashes(checkpoint: Checkpoint, graph: str) -> dict[str, str]:
    """Return the SHA-256 of each tensor of a module in memory, of its config and of its graph."""
    assert isinstance(checkpoint.module, nn.Module)
    texts = {"config": json.dumps(checkpoint.config, sort_keys=True, default=str), "graph": graph}
    hashes = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in texts.items()}
    return hashes | {name: tensor_sha256(tensor) for name, tensor in checkpoint.module.state_dict().items()}


def tensor_sha256(tensor: Tensor) -> str:
    """Return the SHA-256 of a tensor's bytes, in hex."""
    return hashlib.sha256(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().data).hexdigest()


def sources_hash() -> str:
    """Return the SHA-256 of this package's sources, in hex, without the folder `eval`."""
    digest = hashlib.sha256()
    for path in sorted(sources()):
        digest.update(f"{path.relative_to(PACKAGE)}\0{sha256(path)}\n".encode())
    return digest.hexdigest()


def sources() -> Iterator[Path]:
    """Yield the source files of the package; some of its folders are links."""
    for folder, folders, names in os.walk(PACKAGE, followlinks=True):
        folders[:] = [name for name in folders if name != "eval"]
        yield from (Path(folder, name) for name in names if Path(name).suffix in SOURCES)


def versions() -> dict[str, str]:
    """Return the versions that the bytes may depend on."""
    packages = ("quantize-model", "torch", "transformers", "numpy", "safetensors")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}


def gpu_software() -> dict[str, str]:
    """Return the versions of Triton and of NVIDIA's driver, as far as they are there."""
    found = re.search(r"\d+\.\d[\d.]*", NVIDIA.read_text()) if NVIDIA.exists() else None
    triton = {"triton": version("triton")} if importlib.util.find_spec("triton") else {}
    return triton | ({"driver": found[0]} if found else {})


def machine(device: torch.device) -> dict[str, str]:
    """Return the device that the bytes may depend on: the CPU with its unit for bfloat16 products, or a GPU's name."""
    if device.type == "cuda":
        return {"device": torch.cuda.get_device_name(device), "CUDA": str(torch.version.cuda), **gpu_software()}
    return {"device": device.type, "bfloat16 products": bfloat16_unit()}
