"""The compressed-tensors format has no place for some of what artifacts do."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import chain

from torch import nn

from quantize.export.base import ONLINE, Obstacle
from quantize.export.compressed_tensors.experts import experts_not_executed, unplaced_experts, unserved_experts
from quantize.export.compressed_tensors.experts_apart import Parts
from quantize.export.compressed_tensors.format import NAME, has_packed_zero_points, held_schemes
from quantize.export.outline import Outline
from quantize.formats import get_format
from quantize.recipe.targets import TARGETS
from quantize.scheme.scheme import Scheme


def obstacles(outline: Outline) -> Iterator[Obstacle]:
    """Yield one obstacle that names all of it, or nothing."""
    if found := dict(unplaced(outline)):
        remedies = " and ".join(dict.fromkeys(found.values()))
        yield Obstacle(f"{NAME} has no place for {' or '.join(found)}", f"quantize with {remedies}")


def not_executed(runtime: str, outline: Outline, stacks: Mapping[str, Parts] | None = None) -> str:
    """Return why `transformers` or `vllm` does not execute an artifact without obstacles, or nothing.

    Linears of experts that were found already may be given.
    """
    if runtime == "transformers" and outline.settings.get("kv_cache"):
        return "it holds keys and values in floating point; leave out the table kv_cache, or give --target vllm"
    if runtime == "vllm" and (why := unserved(held_schemes(outline).values())):
        return why
    return experts_not_executed(runtime, outline, stacks)


def unserved(schemes: Iterable[Scheme], of_experts: Iterable[Scheme] = ()) -> str:
    """Return why vLLM does not execute linears of some schemes, and experts of others, or nothing."""
    refused = TARGETS["vllm"].refused
    why = chain((refused.get(x.label, "") for x in schemes), map(unserved_experts, of_experts))
    return next(filter(None, why), "")


def unplaced(outline: Outline) -> Iterator[tuple[str, str]]:
    """Yield what the format has no place for, each with what to quantize with instead."""
    settings, schemes, stacks = outline.settings, held_schemes(outline), set(outline.experts)
    yield from unplaced_experts(outline)
    yield from unplaced_schemes(schemes.values())
    cache = settings.get("kv_cache", {})
    if cache.get("value_bits") not in (None, cache.get("num_bits")):
        yield "keys and values of different bits", "no `value_bits` in [kv_cache]"
    if cache.get("residual_length"):
        yield "recent keys and values in floating point", "no `residual_length` in [kv_cache]"
    if settings.get("prefix"):
        yield "a prefix of tokens", "no `prefix`"
    kinds = {path: type(outline.skeleton.get_submodule(path)) for path in schemes if path not in stacks}
    others = [path for path, kind in kinds.items() if not has_plain_forward(kind)]
    for kind in dict.fromkeys(kinds[path] for path in others):
        first, *more = (path for path in others if kinds[path] is kind)
        what = f"{first}{f' and {len(more)} more' if more else ''}, of the class {kind.__name__} and no plain nn.Linear"
        yield what, f"--ignore {','.join(sorted({path.rpartition('.')[2] for path in (first, *more)}))}"
    for entry in (settings["modules"][path] for path in schemes):
        yield from (ONLINE[online["kind"]] for online in entry.get("online", ()))


def unplaced_schemes(schemes: Iterable[Scheme]) -> Iterator[tuple[str, str]]:
    """Yield what the format has no place for in schemes, each with what to quantize with instead."""
    found = list(dict.fromkeys(schemes))
    for name in sorted({scheme.weights.format for scheme in found}):
        if get_format(name).element == "level":
            found_on_grid = get_format(name).zero_point_dtype.is_floating_point
            yield f"{name} weights", "--requantize" if found_on_grid else '`format = "int"` in [weights]'
    if len(found) > 1 and (packed := [scheme.weights.num_bits for scheme in found if has_packed_zero_points(scheme)]):
        what = f"{min(packed)}-bit weights with zero points beside linears of another scheme"
        yield what, "`symmetric = true` in [weights]"
    for args in (scheme.activations for scheme in found if scheme.activations is not None):
        if args.runtime_smooth is not None:
            yield "runtime smooth", "no pass `runtime_smooth`"
        if args.clip_ratio != 1:
            yield "clipped activations", "`clip_ratio = 1.0` in [activations] and no pass `activation_clip`"


def has_plain_forward(kind: type[nn.Module]) -> bool:
    """Return whether a class is a linear that computes no product of its own, which may read its weight."""
    return issubclass(kind, nn.Linear) and kind.forward is nn.Linear.forward
