"""`make tune-gpu` finds the fastest configuration of each scheme and shape for `kernels/configs.json`."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.bench import SHAPES, distance
from benchmarks.gpu.case import Case
from benchmarks.gpu.engines import Ours, WeightOnly
from benchmarks.gpu.machine import cache_bytes, require_gpu
from benchmarks.gpu.timing import Timer, copies, quantile, time_graph
from benchmarks.kernel_budgets.occupancy import MULTIPROCESSORS
from quantize.errors import UsageError
from quantize.kernels.config import TABLE, Config, architecture, fitted, read_table
from quantize.kernels.weight_only_linear import MANY_TOKENS

SCHEMES: dict[str, Ours | WeightOnly] = {
    "w8a8": Ours(8, 8),
    "w4a8": Ours(4, 8),
    "w4a4": Ours(4, 4),
    "w8a8g": Ours(8, 8, 128),
    "w4a8g": Ours(4, 8, 128),
    "w4a16": WeightOnly(),
}
VARIANTS = {
    "w8a8": ("bytes",), "w4a8": ("mask", "shift"), "w4a4": ("pair",),
    "w8a8g": ("bytes",), "w4a8g": ("shift",), "w4a16": ("shift",),
}  # fmt: skip
TILES = (  # tokens, channels, warps, registers at most
    (16, 64, 4, 0), (16, 128, 4, 0), (32, 64, 4, 0), (64, 64, 4, 0), (64, 128, 8, 0), (128, 128, 8, 0),
    (128, 128, 8, 128), (128, 256, 8, 0),
)  # fmt: skip
STAGES = (2, 3, 4)
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
    compile_all(arch, SHAPES)
    rows = {scheme: list(tune(scheme, arch, device, time_graph, SHAPES, tokens_of(scheme))) for scheme in SCHEMES}
    TABLE.write_text(dump(read_table() | {arch: rows}))
    return 0


def tune(
    scheme: str, arch: str, device: torch.device, timer: Timer, shapes: Sequence[tuple[int, int]], tokens: Sequence[int]
) -> Iterator[dict[str, Any]]:
    """Yield a row of the table for each shape: the configuration with the least median time that computes correctly."""
    ours = SCHEMES[scheme]
    for (N, K), M in itertools.product(shapes, tokens):
        operands = operand_sets(ours, (M, N, K), device)
        expected, timed = ours.expected(operands[0]), []
        for config in candidates(scheme, (M, N, K), arch):
            time = measure(functools.partial(ours.run, config), operands, expected, timer)
            if time is not None:
                timed.append((time, config))
        time, best = min(timed, key=lambda pair: pair[0])
        print(f"{scheme} {M} x {N} x {K}: {time:.1f} us of {len(timed)} that ran: {best}", flush=True)
        yield {"shape": [M, N, K], **changed(best)}


def compile_all(arch: str, shapes: Sequence[tuple[int, int]]) -> None:
    """Compile all candidates into Triton's cache by running each once, on all processors."""
    tasks = [
        (scheme, config, (M, N, K))
        for scheme in SCHEMES
        for (N, K), M in itertools.product(shapes, tokens_of(scheme))
        for config in candidates(scheme, (M, N, K), arch)
    ]
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max(1, (os.cpu_count() or 2) - 2), spawn) as workers:
        list(workers.map(run_once, tasks, chunksize=8))


def run_once(task: tuple[str, Config, tuple[int, int, int]]) -> None:
    """Compile and run one product; whether it can be is found out where it is timed."""
    scheme, config, shape = task
    with contextlib.suppress(Exception):
        SCHEMES[scheme].run(config, drawn(scheme, shape))


@functools.lru_cache(maxsize=1)
def drawn(scheme: str, shape: tuple[int, int, int]) -> Any:
    """Draw operands, once for neighbouring tasks."""
    return operand_sets(SCHEMES[scheme], shape, torch.device("cuda"), 1)[0]


def operand_sets(
    ours: Ours | WeightOnly, shape: tuple[int, int, int], device: torch.device, count: int | None = None
) -> list[Any]:
    """Draw so many operands, or as many as are together too large for the cache."""
    rng = torch.Generator(device).manual_seed(0)
    count = count or copies(ours.product(*shape).bytes, cache_bytes(device))
    return [ours.operands(*shape, rng) for _ in range(count)]


def tokens_of(scheme: str) -> tuple[int, ...]:
    """Return the numbers of tokens for which a scheme has rows; the nearest row serves all others."""
    return (16, 64, MANY_TOKENS // 2) if scheme == "w4a16" else (16, 64, 256, 4096)


def candidates(scheme: str, shape: tuple[int, int, int], arch: str) -> Iterator[Config]:
    """Yield configurations that may be fast: tiles near the number of tokens that fit shared memory, with K split."""
    M, N, K = shape
    for (block_m, block_n, warps, registers), stages, variant in itertools.product(TILES, STAGES, VARIANTS[scheme]):
        if not min(M / 4, 64) <= block_m <= max(16, M):
            continue
        tiles = -(-M // block_m) * -(-N // block_n)
        wide = block_m == 16 or (block_m <= 64 and scheme.endswith(("g", "w4a16")))
        for block_k, split_k in itertools.product((128, 256) if wide else (128,), (1, 2, 4, 8)):
            asm = arch.startswith("sm_") and variant != "bytes" and scheme != "w4a16"
            config = Config(block_m, block_n, block_k, split_k, warps, stages, registers, variant, asm)
            useful = split_k == 1 or tiles * split_k <= MOST_PROGRAMS
            if (
                useful
                and fits(config, arch, 2 if scheme == "w4a16" else 1)
                and (fitted(config, M, K, scheme.endswith("g")) == config)
            ):
                yield config


def fits(config: Config, arch: str, activation_bytes: int = 1) -> bool:
    """Return whether the pipeline's stages fit the shared memory of a multiprocessor."""
    weight_bytes = config.block_n * config.block_k // (1 if config.variant == "bytes" else 2)
    used = config.num_stages * (weight_bytes + config.block_m * config.block_k * activation_bytes)
    sm = MULTIPROCESSORS.get(arch, MULTIPROCESSORS["sm_80"])
    return used + sm.reserved <= sm.shared


def measure(run: Callable[[Any], Tensor], operands: Sequence[Any], expected: Tensor, timer: Timer) -> float | None:
    """Return microseconds of a product, or None if the configuration does not compile, does not run, or is wrong."""
    try:
        if not distance(Case(lambda: run(operands[0]), lambda: expected)) <= TOLERANCE:
            return None
        return quantile(timer([functools.partial(run, each) for each in operands]), 0.5)
    except Exception as failure:  # Triton raises many classes, for resources and for code it cannot compile
        print(f"{run}: {str(failure)[-200:]}", file=sys.stderr)
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
