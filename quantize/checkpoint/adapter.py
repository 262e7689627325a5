"""A LoRA adapter, as the library PEFT writes it, is merged into the weights of its base while they are read."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import re2
from torch import Tensor

from quantize.checkpoint.files_seen import FilesSeen
from quantize.checkpoint.paths import ADAPTER
from quantize.checkpoint.safetensors_reader import read_header, read_rows
from quantize.checkpoint.untrusted_files import check_files, read_json
from quantize.errors import QuantizeError, UsageError, shown
from quantize.recipe.patterns import compiled

WEIGHTS, PREFIX = "adapter_model.safetensors", "base_model.model."


@dataclass(frozen=True)
class Adapter:
    """What an adapter changes in its base.

    Attributes:
        weights: the file with its tensors.
        pairs: parameter of the base → the name in the file before `lora_A.weight` and `lora_B.weight`, and the scale.
        replaced: parameter of the base → the tensor in the file that takes its place.
        transposed: whether the base stores its weights [inputs, outputs], as GPT-2 does.
        seen: its files as they were when it was opened.
    """

    weights: Path
    pairs: Mapping[str, tuple[str, float]]
    replaced: Mapping[str, str]
    transposed: bool
    seen: FilesSeen

    def merged(self, names: Iterable[str], W: Tensor) -> Tensor:
        """Return W + s·B·A in float32 (LoRA, arXiv 2106.09685, eq. 3) for a parameter that goes by some names.

        Raises:
            QuantizeError: the adapter does not fit the parameter.
            ChangedError: its file has changed since it was opened.
        """
        for name in names:
            if name in self.replaced:
                found = self._read(self.replaced[name])
                self._require_shape(name, W, list(found.shape))
                W = found
            elif name in self.pairs:
                stem, scale = self.pairs[name]
                A, B = (self._read(f"{stem}lora_{part}.weight") for part in "AB")
                if A.dim() != 2 or B.dim() != 2 or A.shape[0] != B.shape[1]:
                    raise QuantizeError(f"{self.weights}: the factors of {name} are {list(A.shape)}, {list(B.shape)}")
                shape = [B.shape[0], A.shape[1]]
                self._require_shape(name, W, shape[::-1] if self.transposed else shape)
                change = B @ A * scale
                W = W.float() + (change.T if self.transposed else change)
        return W

    def _require_shape(self, name: str, W: Tensor, found: list[int]) -> None:
        if found != list(W.shape):
            raise QuantizeError(
                f"{self.weights} changes {name} by {found}, where the base has {list(W.shape)}; "
                "give the base that the adapter was trained on"
            )

    def _read(self, name: str) -> Tensor:
        self.seen.require_same(self.weights)
        found = read_rows(self.weights, name)
        if not found.is_floating_point():
            raise QuantizeError(f"{self.weights} holds {name} of {found.dtype}; an adapter has floating point")
        return found.float()


def open_adapter(directory: Path, find: Callable[[str], str], known: Iterable[str]) -> Adapter:
    """Find what an adapter changes, without reading a weight.

    Args:
        directory: a directory with `adapter_config.json` and `adapter_model.safetensors`.
        find: returns the name in the base for a parameter's plain name.
        known: the names of the base's parameters.

    Raises:
        UsageError: the directory holds no adapter, or one of another kind than LoRA on linears.
        QuantizeError: its files are damaged, or change what the base does not have.
    """
    path, weights = directory / ADAPTER, directory / WEIGHTS
    if not path.is_file() or not weights.is_file():
        raise UsageError(f"{directory} holds no LoRA adapter, which is {ADAPTER} and {WEIGHTS}")
    check_files(directory)
    config, names, pairs, replaced = read_json(path), set(known), dict[str, tuple[str, float]](), dict[str, str]()
    require_plain(path, config)
    entries, patterns = read_header(weights).entries, config.get("alpha_pattern")
    if isinstance(patterns, dict) and len(patterns) > len(entries):
        raise QuantizeError(f"{path} has {len(patterns)} patterns for an adapter of {len(entries)} tensors")
    for name in sorted(entries):
        stem, cut, _ = name.partition("lora_A.weight")
        if name.endswith("lora_B.weight") and name.replace("lora_B", "lora_A") in entries:
            continue
        module = stem.removeprefix(PREFIX).removesuffix(".")
        target = find(f"{module}.weight" if cut else module)
        if "lora_" in target or target not in names or (cut and f"{stem}lora_B.weight" not in entries):
            raise QuantizeError(f"{weights} holds {name}, which changes no weight of the base; merge the adapter first")
        if cut:
            pairs[target] = (stem, scale_of(path, config, module, next(iter(entries[name].shape), 0)))
        else:
            replaced[target] = name
    return Adapter(weights, pairs, replaced, bool(config.get("fan_in_fan_out")), FilesSeen.of([path, weights]))


def require_plain(path: Path, config: Mapping[str, Any]) -> None:
    """Check that an adapter is one of plain LoRA.

    Raises:
        UsageError: it is not.
    """
    kind, bias = config.get("peft_type"), config.get("bias", "none")
    found = [
        key for key in ("use_dora", "target_parameters", "layer_replication", "megatron_config") if config.get(key)
    ]
    found += [f"peft_type {shown(kind)}"] if kind != "LORA" else []
    found += [f"bias {shown(bias)}"] if bias != "none" else []
    if found:
        raise UsageError(
            f"{path} has {found[0]}; only plain LoRA is merged while reading, so merge this adapter with PEFT's "
            "merge_and_unload first"
        )


def scale_of(path: Path, config: Mapping[str, Any], module: str, rank: int) -> float:
    """Return s = α/r, or α/√r for rank-stabilized LoRA (arXiv 2312.03732), with the α of this module.

    Raises:
        QuantizeError: the config has no such number.
    """
    patterns = config.get("alpha_pattern") or {}
    try:
        own = (a for pattern, a in patterns.items() if compiled(rf"(.*\.)?({pattern})").fullmatch(module))
        alpha = float(next(own, config["lora_alpha"]))
        scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError, OverflowError, re2.error):
        raise QuantizeError(f"{path} gives no scale for {module}: lora_alpha or alpha_pattern is wrong") from None
    if not math.isfinite(scale):
        raise QuantizeError(f"{path} gives {module} the scale {scale}")
    return scale
