"""The compressed-tensors format has no place for some of what artifacts do."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from quantize.export.base import Obstacle
from quantize.export.compressed_tensors.experts import unplaced_experts
from quantize.export.compressed_tensors.format import NAME, has_packed_zero_points, held_schemes
from quantize.export.outline import Outline
from quantize.formats import get_format

ROTATION = ("a rotation of activations", "`online_hadamard = false` in the pass that rotates")
ONLINE = {"hadamard": ROTATION, "dual": ROTATION, "shift": ("a bias on what is rounded", "no pass `noisy_bias`")}


def obstacles(outline: Outline) -> Iterator[Obstacle]:
    """Yield one obstacle that names all of it, or nothing."""
    if found := dict(unplaced(outline)):
        remedies = " and ".join(dict.fromkeys(found.values()))
        yield Obstacle(f"{NAME} has no place for {' or '.join(found)}", f"quantize with {remedies}")


def unplaced(outline: Outline) -> Iterator[tuple[str, str]]:
    """Yield what the format has no place for, each with what to quantize with instead."""
    settings, schemes, stacks = outline.settings, held_schemes(outline), set(outline.experts)
    yield from unplaced_experts(outline)
    for name in sorted({scheme.weights.format for scheme in schemes.values()}):
        if get_format(name).element == "level":
            yield f"{name} weights", '`format = "int"` in [weights]'
    if len(set(schemes.values())) > 1 and any(map(has_packed_zero_points, schemes.values())):
        yield "4-bit weights with zero points beside linears of another scheme", "`symmetric = true` in [weights]"
    if settings.get("prefix"):
        yield "a prefix of tokens", "no `prefix`"
    if settings.get("kv_cache"):
        yield "keys and values with a scale for each token", "no table `kv_cache`"
    for path, entry in ((path, settings["modules"][path]) for path in schemes):
        module = None if path in stacks else outline.skeleton.get_submodule(path)
        if module is not None and not isinstance(module, nn.Linear):
            yield f"{path}, which is a {type(module).__name__} and no nn.Linear", f"--ignore {path}"
        yield from (ONLINE[online["kind"]] for online in entry.get("online", ()))
        args = schemes[path].activations
        if args is not None and args.runtime_smooth is not None:
            yield "runtime smooth", "no pass `runtime_smooth`"
        if args is not None and args.clip_ratio != 1:
            yield "clipped activations", "`clip_ratio = 1.0` in [activations] and no pass `activation_clip`"
