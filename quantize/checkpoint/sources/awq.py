"""AWQ's layout `gemm`: `qweight` [K, N / 8], `qzeros` [G, N / 8], `scales` [G, N], columns in an order of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from quantize.checkpoint.sources.encoded import Encoded, Entries, Parts, unpack_bits
from quantize.checkpoint.sources.gptq import join, packed_parts
from quantize.errors import UsageError, shown

BITS = 4
PLACES = [0, 4, 1, 5, 2, 6, 3, 7]  # where each of 8 columns lies, since columns are packed as 0 2 4 6 1 3 5 7


def find(settings: Mapping[str, Any], entries: Entries) -> dict[str, Encoded]:
    """Return the weights that are stored as `qweight`.

    Raises:
        UsageError: the config names another layout than gemm with 4 bits.
        QuantizeError: a part is missing.
    """
    bits, version = settings.get("bits", settings.get("w_bit", BITS)), settings.get("version", "gemm")
    paths = [name.removesuffix(".qweight") for name in entries if name.endswith(".qweight")]
    if paths and (bits != BITS or str(version).lower() != "gemm"):
        raise UsageError(
            f"the AWQ weights have {shown(bits)} bits and the layout {shown(version)}; 4 and gemm can be read"
        )
    return {f"{path}.weight": Encoded(packed_parts(path, entries), decode) for path in paths}


def decode(name: str, parts: Parts) -> Tensor:
    """Return a weight [N, K]."""
    q, zero_point = (unpack_bits(parts[role], BITS, 1).unflatten(1, (-1, 8))[..., PLACES].flatten(1)
                     for role in ("values", "zero_point"))  # fmt: skip
    return join(name, q, parts["scale"], zero_point, None)
