"""Some kernels miss a demand for a reason that is given here; a miss without a reason fails a test."""

from __future__ import annotations

import re

REASONS = (  # kernel, GPU, reason; the first match counts
    (
        r"(experts )?w4a8g .*", r"gfx942",
        "the AMD compiler takes shifts of int8 tensors apart, and inline assembly on them does not compile; masks "
        "instead would need sums of half groups of activations",
    ),
    (
        r"w4a8g .* zero points", r"sm_120",
        "zero points and sums of a group pass through shared memory on their way, and count among the operands there",
    ),
    (
        r"(experts )?w[48]a8g 16x64", r".*",
        "16 tokens of one group are 1 KB, 8 bytes for each of the 128 threads; two groups at once would be two sums",
    ),
    (
        r"w4a16 64x128", r"sm_(80|89|120)",
        "warps stand two by two, so two of them unpack each weight",
    ),
    (
        r"w4a16 levels .*", r".*",
        "each code is looked up by itself, in a table that the first cache holds",
    ),
    (
        r"w4a16 .*", r"gfx942",
        "a step has 64 columns, 128 bytes of a token, of which each of 16 lanes takes 8",
    ),
    (
        r"w4a[48] .*", r"gfx942",
        "waves stand two by two, so two of them unpack each weight",
    ),
    (
        r"(mxfp4|nvfp4) .*", r"sm_1[02]0",
        "scales of blocks lie in rows of K / 32 or K / 16 bytes, of which a tile takes 8 or 16",
    ),
    (
        r"smooth w4a4 .*", r".*",
        "the order of the channels is known only when it runs, so weights lie channel by channel, and their bytes are "
        "transposed for the tensor cores",
    ),
)  # fmt: skip


def reason_for(kernel: str, arch: str) -> str:
    """Return why a kernel misses a demand on a GPU, or an empty text if no reason is known."""
    fitting = (why for name, gpu, why in REASONS if re.fullmatch(name, kernel) and re.fullmatch(gpu, arch))
    return next(fitting, "")
