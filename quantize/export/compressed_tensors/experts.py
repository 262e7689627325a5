"""A stack of experts is written as a linear for each expert and product, under the names that checkpoints have.

Where checkpoints hold it as one tensor, the stack's own name tells those of the linears (`experts_apart.py`).

Sources: `conversion_mapping.py` of transformers 5.24 for the names, and its `integrations/compressed_tensors.py` for
what it reads; `compressed_tensors_moe.py` of vLLM at 0043d6b for what it multiplies.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping

from torch import Tensor

from quantize.checkpoint.key_mapping import linears_in_files, stored_name
from quantize.errors import ExportError
from quantize.export.compressed_tensors.experts_apart import Parts, find_parts
from quantize.export.compressed_tensors.format import storage
from quantize.export.outline import Outline
from quantize.formats import get_format
from quantize.formats.qtensor import QTensor
from quantize.scheme.scheme import Scheme

LOADED = {"pack-quantized", "mxfp4-pack-quantized"}  # experts that transformers reads
IN_TURNS = "it reads no experts apart whose gates and linear values take turns"  # vLLM 0.32, `models/gpt_oss.py`


def expert_parts(outline: Outline) -> dict[str, Parts | str]:
    """Return the linears of each stack, as checkpoints have them or else apart; or a clause that says why not."""
    entries = {path: outline.settings["modules"][path] for path in outline.experts}
    found = {path: linears_in_files(outline.skeleton, path, entry["transposed"]) for path, entry in entries.items()}
    mapped: dict[str, Parts | str] = {path: Parts(linears) for path, linears in found.items() if linears}
    if len(mapped) == len(entries):
        return mapped
    try:
        apart = dict(find_parts(outline.program))
    except ExportError as error:
        apart = dict.fromkeys(entries, f"and the model cannot be exported ({error.reason})")
    return {path: mapped.get(path) or apart.get(path, "and its graph shows no products of them") for path in entries}


def written_parts(outline: Outline) -> dict[str, Parts]:
    """Return the linears of each stack of an artifact without obstacles."""
    return {path: parts for path, parts in expert_parts(outline).items() if isinstance(parts, Parts)}


def unplaced_experts(outline: Outline) -> Iterator[tuple[str, str]]:
    """Yield what no reader of the format has a place for, each with what to quantize with instead."""
    stacks, schemes = expert_parts(outline), outline.schemes()
    if not stacks:
        return
    if whole := sorted((path, why) for path, why in stacks.items() if isinstance(why, str)):
        (path, why), cls = whole[0], outline.config["architectures"][0]
        yield f"{path}, which checkpoints of {cls} hold as one tensor, {why}", "--ignore 're:.*experts.*'"
    owners = {path.rpartition(".")[0] for path in stacks}
    others = [name for name, p in outline.skeleton.named_parameters() if p.dim() == 3 and name not in stacks]
    found = {schemes[path] for path in stacks}
    beside = any(
        name.rpartition(".")[0] in owners or linears_in_files(outline.skeleton, name, False) for name in others
    )
    if len(found) > 1 or beside:
        yield "experts of several schemes or group sizes", "one scheme and one --group-size for all experts"
    for scheme in found:
        if get_format(scheme.weights.format).has_global_scale:
            yield "experts of NVFP4", "an entry of [[layers]] that gives the experts W8A8"
        elif not scheme.weights.symmetric:
            yield "experts with zero points", "`symmetric = true` in [weights]"


def experts_not_executed(runtime: str, outline: Outline, stacks: Mapping[str, Parts] | None = None) -> str:
    """Return why `transformers` or `vllm` does not execute the experts of an artifact without obstacles, or nothing.

    What `written_parts` found may be given, as it searches the graph.
    """
    schemes, parts = outline.schemes(), (written_parts(outline) if stacks is None else stacks).values()
    if runtime == "transformers" and not all(found.mapped for found in parts):
        return "it holds these experts in one tensor and reads no others; quantize with --ignore 're:.*experts.*'"
    if runtime == "vllm" and any(found.in_turns for found in parts):
        return f"{IN_TURNS}; quantize with --ignore 're:.*experts.*'"
    for scheme in {schemes[path] for path in outline.experts}:
        if runtime == "transformers" and storage(scheme) not in LOADED:
            return f"it reads no experts of {scheme.label} in bytes; quantize with W4A16, W4A8 or W4A4"
        if runtime == "vllm" and (why := unserved_experts(scheme)):
            return why
    return ""


def unserved_experts(scheme: Scheme) -> str:
    """Return why vLLM does not execute experts of a scheme, or nothing."""
    by_channel = scheme.label == "W8A8" and not scheme.weights.group_size
    if by_channel or scheme.label in ("W4A16", "MXFP4"):
        return ""
    why = f"it has no product of experts in {scheme.label}"
    return f"{why}; quantize with W4A16, or give the experts W8A8 by an entry of [[layers]]"


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


def with_experts(schemes: Mapping[str, Scheme], stacks: Mapping[str, Parts]) -> dict[str, Scheme]:
    """Return schemes by path, with patterns for the linears of experts in the place of stacks."""
    patterns = {path: expert_targets(parts.linears) for path, parts in stacks.items()}
    return {place: scheme for path, scheme in schemes.items() for place in patterns.get(path, [path])}
