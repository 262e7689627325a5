"""`make tune-gpu` finds the fastest configuration of each scheme and shape for `kernels/configs.json`."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch

from benchmarks.gpu.bench import SHAPES, TOKENS, distance
from benchmarks.gpu.engines import Ours
from benchmarks.gpu.machine import cache_bytes, require_gpu
from benchmarks.gpu.timing import Timer, copies, quantile, time_graph
from benchmarks.kernel_budgets.occupancy import MULTIPROCESSORS
from quantize.errors import UsageError
from quantize.kernels.config import TABLE, Config, architecture, fitted, read_table

SCHEMES = {
    "w8a8": Ours(8, 8),
    "w4a8": Ours(4, 8),
    "w4a4": Ours(4, 4),
    "w8a8g": Ours(8, 8, 128),
    "w4a8g": Ours(4, 8, 128),
}
VARIANTS = {"w8a8": ("bytes",), "w4a8": ("mask", "shift"), "w4a4": ("pair",), "w8a8g": ("bytes",), "w4a8g": ("shift",)}
TILES = (  # tokens, channels, warps, registers at most
    (16, 64, 4, 0), (16, 128, 4, 0), (32, 64, 4, 0), (64, 64, 4, 0), (64, 128, 8, 0), (128, 128, 8, 0),
    (128, 128, 8, 128), (128, 256, 8, 0),
)  # fmt: skip
STAGES = (2, 3, 4, 5)
MOST_PROGRAMS = 1024  # more parts only add work
TOLERANCE = 1e-2


def main() -> int:
    """Tune for this machine's GPU and write its rows into the table; return the exit code."""
    try:
        require_gpu()
    except UsageError as error:
        print(error, file=sys.stderr)
        return 2
    device = torch.device("cuda")
    arch = architecture(device)
    rows = {scheme: list(tune(scheme, arch, device, time_graph, SHAPES, TOKENS)) for scheme in SCHEMES}
    TABLE.write_text(dump(read_table() | {arch: rows}))
    return 0


def tune(
    scheme: str, arch: str, device: torch.device, timer: Timer, shapes: Sequence[tuple[int, int]], tokens: Sequence[int]
) -> Iterator[dict[str, Any]]:
    """Yield a row of the table for each shape: the configuration with the least median time that computes correctly."""
    for (N, K), M in itertools.product(shapes, tokens):
        timed = []
        for config in candidates(scheme, (M, N, K), arch):
            time = measure(config, scheme, (M, N, K), device, timer)
            if time is not None:
                timed.append((time, config))
        time, best = min(timed, key=lambda pair: pair[0])
        print(f"{scheme} {M} x {N} x {K}: {time:.1f} us of {len(timed)} that ran: {best}", flush=True)
        yield {"shape": [M, N, K], **changed(best)}


def candidates(scheme: str, shape: tuple[int, int, int], arch: str) -> Iterator[Config]:
    """Yield configurations that may be fast: tiles near the number of tokens that fit shared memory, with K split."""
    M, N, K = shape
    for (block_m, block_n, warps, registers), stages, variant in itertools.product(TILES, STAGES, VARIANTS[scheme]):
        if not min(M / 4, 64) <= block_m <= max(16, M):
            continue
        tiles = -(-M // block_m) * -(-N // block_n)
        for block_k, split_k in itertools.product((128, 256) if block_m == 16 else (128,), (1, 2, 4, 8)):
            asm = arch.startswith("sm_") and variant != "bytes"
            config = Config(block_m, block_n, block_k, split_k, warps, stages, registers, variant, asm)
            useful = split_k == 1 or tiles * split_k <= MOST_PROGRAMS
            if useful and fits(config, arch) and fitted(config, M, K, scheme.endswith("g")) == config:
                yield config


def fits(config: Config, arch: str) -> bool:
    """Return whether the pipeline's stages fit the shared memory of a multiprocessor."""
    weight_bytes = config.block_n * config.block_k // (1 if config.variant == "bytes" else 2)
    used = config.num_stages * (weight_bytes + config.block_m * config.block_k)
    sm = MULTIPROCESSORS.get(arch, MULTIPROCESSORS["sm_80"])
    return used + sm.reserved <= sm.shared


def measure(
    config: Config, scheme: str, shape: tuple[int, int, int], device: torch.device, timer: Timer
) -> float | None:
    """Return microseconds of a product, or None if the configuration does not compile, does not run, or is wrong."""
    ours, rng = SCHEMES[scheme], torch.Generator(device).manual_seed(0)
    try:
        case = ours.case_of(config, *shape, rng)
        if not distance(case) <= TOLERANCE:
            return None
        count = copies(ours.product(*shape).bytes, cache_bytes(device))
        calls = [case.run, *(ours.case_of(config, *shape, rng).run for _ in range(count - 1))]
        return quantile(timer(calls), 0.5)
    except Exception as failure:  # Triton raises many classes, for resources and for code it cannot compile
        print(f"{scheme} {shape} {config}: {failure}", file=sys.stderr)
        return None


def changed(config: Config) -> dict[str, Any]:
    """Return the settings that differ from the default, by name, and always the tile."""
    default = asdict(Config())
    always = ("block_m", "block_n", "block_k", "split_k", "variant")
    return {name: value for name, value in asdict(config).items() if name in always or value != default[name]}


def dump(table: Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]]) -> str:
    """Return the table as JSON, with one row in a line."""
    archs = []
    for arch, schemes in table.items():
        parts = [
            f'  "{scheme}": [\n   ' + ",\n   ".join(map(json.dumps, rows)) + "\n  ]" for scheme, rows in schemes.items()
        ]
        archs.append(f' "{arch}": {{\n' + ",\n".join(parts) + "\n }")
    return "{\n" + ",\n".join(archs) + "\n}\n"


if __name__ == "__main__":
    sys.exit(main())
