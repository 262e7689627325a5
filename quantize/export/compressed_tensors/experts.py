"""A stack of experts is written as a linear for each expert and product, under the names that checkpoints have.

Sources: `conversion_mapping.py` of transformers 5.24 for the names, and its `integrations/compressed_tensors.py` for
what it reads; `compressed_tensors_moe.py` of vLLM at 0043d6b for what it multiplies.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping

from torch import Tensor

from quantize.checkpoint.key_mapping import linears_in_files, stored_name
from quantize.export.compressed_tensors.format import storage
from quantize.export.outline import Outline
from quantize.formats import get_format
from quantize.formats.qtensor import QTensor
from quantize.scheme.scheme import Scheme

LOADED = {"pack-quantized", "mxfp4-pack-quantized"}  # experts that transformers reads


def expert_linears(outline: Outline) -> dict[str, dict[str, Tensor]]:
    """Return for each stack its linears by their paths in checkpoints, each with its rows of the stack."""
    entries = {path: outline.settings["modules"][path] for path in outline.experts}
    return {path: linears_in_files(outline.skeleton, path, entry["transposed"]) for path, entry in entries.items()}


def unplaced_experts(outline: Outline) -> Iterator[tuple[str, str]]:
    """Yield what no reader of the format has a place for, each with what to quantize with instead."""
    stacks, schemes = expert_linears(outline), outline.schemes()
    if not stacks:
        return
    if whole := sorted(path for path, linears in stacks.items() if not linears):
        cls = outline.config["architectures"][0]
        yield f"{whole[0]}, which checkpoints of {cls} hold as one tensor", "--ignore 're:.*experts.*'"
    others = [name for name, p in outline.skeleton.named_parameters() if p.dim() == 3 and name not in stacks]
    found = {schemes[path] for path in stacks}
    if len(found) > 1 or any(linears_in_files(outline.skeleton, name, False) for name in others):
        yield "experts of several schemes or group sizes", "one scheme and one --group-size for all experts"
    for scheme in found:
        if get_format(scheme.weights.format).has_global_scale:
            yield "experts of NVFP4", "an entry of [[layers]] that gives the experts W8A8"
        elif not scheme.weights.symmetric:
            yield "experts with zero points", "`symmetric = true` in [weights]"


def experts_not_executed(runtime: str, outline: Outline) -> str:
    """Return why `transformers` or `vllm` does not execute the experts of an artifact without obstacles, or nothing."""
    schemes = outline.schemes()
    for scheme in {schemes[path] for path in outline.experts}:
        if runtime == "transformers" and storage(scheme) not in LOADED:
            return f"it reads no experts of {scheme.label} in bytes; quantize with W4A16, W4A8 or W4A4"
        by_channel = scheme.label == "W8A8" and not scheme.weights.group_size
        if runtime == "vllm" and not (by_channel or scheme.label in ("W4A16", "MXFP4")):
            why = f"it has no product of experts in {scheme.label}"
            return f"{why}; quantize with W4A16, or give the experts W8A8 by an entry of [[layers]]"
    return ""


def rows_of(weight: QTensor, rows: Tensor) -> QTensor:
    """Return some rows of a weight without a global scale, by their numbers."""
    return weight.cat_rows([{name: tensor[rows] for name, tensor in weight.tensors().items()}])


def expert_targets(linears: Iterable[str]) -> list[str]:
    """Return the patterns that match linears of experts, whatever the number of the expert is."""
    parents = (path.rpartition(".")[0] for path in linears)
    return sorted({"re:" + re.sub(r"\\\.\d+$", r"\\.\\d+", re.escape(parent)) + r"\..*" for parent in parents})


def names_in_checkpoints(outline: Outline) -> dict[str, str]:
    """Return the names that tensors of a mixture have in checkpoints, by their names in the model; for others none.

    Transformers reads both; vLLM knows the names in checkpoints alone.
    """
    if not outline.experts:
        return {}
    names = outline.skeleton.state_dict().keys() - outline.experts
    return {name: stored_name(outline.skeleton, name) for name in sorted(names)}


def with_experts(schemes: Mapping[str, Scheme], stacks: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Scheme]:
    """Return schemes by path, with patterns for the linears of experts in the place of stacks."""
    patterns = {path: expert_targets(linears) for path, linears in stacks.items()}
    return {place: scheme for path, scheme in schemes.items() for place in patterns.get(path, [path])}
