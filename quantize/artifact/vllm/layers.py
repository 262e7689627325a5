"""What linears must have in common where vLLM holds several as one, and where ranks split their columns."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from quantize.artifact.manifest import Entry, QuantizationSettings
from quantize.errors import UsageError
from quantize.scheme.scheme import KVCacheArgs, Scheme


def require_served(settings: QuantizationSettings) -> None:
    """Check that vLLM has a place for all parts of an artifact.

    Raises:
        UsageError: it has a prefix or experts.
    """
    if settings.prefix:
        raise UsageError(
            "the artifact has a prefix, in front of which vLLM puts no tokens; quantize without `prefix` to serve it"
        )
    if stacks := [path for path, entry in settings.modules.items() if entry.experts is not None]:
        raise UsageError(
            f"{stacks[0]} holds experts in one tensor, which the plugin does not serve; export to compressed-tensors"
        )


def cache_note(args: KVCacheArgs) -> str:
    """Return which option of vLLM serves a quantized KV cache, and what of it no option does."""
    note = f"The artifact has a quantized KV cache, which --kv-cache-dtype int{args.num_bits}_per_token_head serves"
    return f"{note}, without its recent tokens in floating point." if args.residual_length else f"{note}."


def linears_of(layer: str, fused: Mapping[str, Sequence[str]], quantized: Mapping[str, Entry]) -> list[str]:
    """Return the paths of the quantized linears whose rows a layer of vLLM holds, [] if it is not quantized.

    Args:
        layer: the path of the layer.
        fused: the name of a layer that vLLM has made of several linears → their names.
        quantized: the quantized linears by path.

    Raises:
        UsageError: some are quantized and some are not, or their weights differ in bits, format or groups.
    """
    parent, _, name = layer.rpartition(".")
    paths = [f"{parent}.{part}" if parent else part for part in fused.get(name, [name])]
    found = [path for path in paths if path in quantized]
    if found and (rest := [path for path in paths if path not in quantized]):
        raise UsageError(
            f"vLLM holds {found[0]} and {rest[0]} as one weight, but only the first is quantized; quantize both or none"
        )
    return found


def require_one_weight(schemes: Mapping[str, Scheme]) -> None:
    """Check that the weights of linears, by path, can be held as one.

    Raises:
        UsageError: they differ in bits, format or groups.
    """
    (first, scheme), *rest = schemes.items()
    for path, other in rest:
        if other.weights != scheme.weights:
            ways = [
                f"{s.weights.format}{s.weights.num_bits} in groups of {s.weights.group_size}" for s in (scheme, other)
            ]
            raise UsageError(
                f"vLLM holds {first} and {path} as one weight, but one is {ways[0]} and one {ways[1]}; give both one "
                "scheme"
            )


def require_split(path: str, entry: Entry, scheme: Scheme, ranks: int) -> None:
    """Check that the columns of a linear can be dealt out to ranks of tensor parallelism.

    Each rank then quantizes its own channels with a scale of its own, which is at least as fine as the artifact's.

    Raises:
        UsageError: a group of columns, an online transform or runtime smooth would reach over ranks.
    """
    columns, remedy = entry.columns // ranks, "use a smaller --tensor-parallel-size"
    if scheme.activations and scheme.activations.runtime_smooth:
        raise UsageError(
            f"{path} has runtime_smooth, which sorts all {entry.columns} channels, and tensor parallelism would deal "
            f"them out to {ranks} ranks; serve it on one GPU"
        )
    in_bytes = 8 // math.gcd(8, scheme.weights.stored_bits)  # columns that fill whole bytes
    whole = math.lcm(in_bytes, scheme.weights.group_size or 1)
    if columns % whole:
        raise UsageError(
            f"{path} has groups of {whole} columns, which do not divide the {columns} columns of each of {ranks} "
            f"ranks; {remedy}"
        )
    for online in entry.online:
        if online["kind"] != "hadamard" or columns % (online["size"] * online["stride"]):
            raise UsageError(
                f"{path} has an online transform ({online['kind']}) over more than the {columns} channels of each of "
                f"{ranks} ranks; {remedy}, or quantize with online_hadamard = false or a block_size in the pass that "
                "rotates"
            )
