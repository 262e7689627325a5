"""A run on a model of a few blocks says what a run on all of them takes, and what it would take at least."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.roofline import Product, Roof
from benchmarks.scale.model import SHAPES, write_model, write_tokens
from benchmarks.scale.phases import WAITING, Phases, watch
from benchmarks.scale.run import settings
from quantize.pipeline.estimate.device_memory import foretell, parse_memory
from quantize.pipeline.prepare import prepare
from quantize.pipeline.quantize import quantize_model
from quantize.recipe.recipe import load_recipe

SAMPLES, SEQLEN, MEMORY = 128, 2048, "20GB"
RUNS = {"8B": (2, 32), "70B": (2, 80), "1.1B": (16, 16)}  # the blocks that are run, and those of a whole model
GOALS = {"8B": 180, "70B": 900}  # seconds of a whole model
SWEEPS = 2  # of the default recipe
LAYER = re.compile(r"\blayers\.\d")  # in the name of a block that a whole model has more often
Record = dict[str, Any]


def measured(
    size: str, folder: Path, device: torch.device, roof: Roof, samples: int = SAMPLES, seqlen: int = SEQLEN
) -> Record:
    """Quantize a model to W4A16 by GPTQ with default settings, and return seconds by phase and the peak of memory.

    Args:
        size: a key of `RUNS`.
        folder: an empty directory.
        device: where the run computes, within `MEMORY` on a GPU.
        roof: the rates of the device, for the least time.
        samples, seqlen: the calibration data.
    """
    layers, whole = RUNS[size]
    model, tokens, memory = folder / "model", folder / "tokens.jsonl", None if device.type == "cpu" else MEMORY
    parameters = write_model(model, size, layers, device.type)
    write_tokens(tokens, size, samples, seqlen)
    analysis, foretold = foreseen(whole, folder, memory, samples, seqlen)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # of what ran before
        torch.cuda.reset_peak_memory_stats()
    with watch() as phases:
        start = time.perf_counter()
        quantize_model(model, output_dir=folder / "out", scheme="W4A16", device=device, device_memory=memory,
                       recipe=settings(model, "gptq"), calibration=tokens, nsamples=samples, seqlen=seqlen)  # fmt: skip
        spans = spans_of(phases, start, time.perf_counter())
    before, finish, blocks = spans["before"], spans["finish"], [s for name, s in spans.items() if LAYER.search(name)]
    begun = before - phases.phases["prepare"].seconds  # what else precedes the blocks, as they go through the model
    more = whole / layers
    growth = 1 + (whole - layers) * layer_parameters(size) / parameters
    return {
        "size": size, "layers": layers, "whole": whole, "parameters": parameters, "seconds": sum(spans.values()),
        "seconds_whole": sum(spans.values()) - before - finish + (whole - layers) * max(blocks)
        + analysis + more * begun + growth * finish,
        "seconds_least": least_seconds(size, whole, samples * seqlen, roof),
        "peak_bytes": torch.cuda.max_memory_allocated() if device.type == "cuda" else 0,
        "reserved_bytes": torch.cuda.max_memory_reserved() if device.type == "cuda" else 0,
        "foretold_bytes": foretold, "reading_and_writing": sum(x.aside for x in phases.phases.values()),
        "waiting": phases.phases[WAITING].seconds, "hidden": phases.hidden(), "spans": spans,
        "phases": {name: dataclasses.asdict(phase) for name, phase in phases.phases.items()},
    }  # fmt: skip


def spans_of(phases: Phases, start: float, end: float) -> dict[str, float]:
    """Return the seconds of a run before its first block, in each block, and behind the last one."""
    marks = [("before", start), *phases.blocks, ("", end)]
    return {name: after - begin for (name, begin), (_, after) in itertools.pairwise(marks)}


def foreseen(layers: int, folder: Path, memory: str | None, samples: int, seqlen: int) -> tuple[float, int]:
    """Return the seconds of analysing a model of so many layers, by its config, and the bytes foretold on a GPU."""
    config = {**json.loads((folder / "model" / "config.json").read_text()), "num_hidden_layers": layers}
    (folder / "whole").mkdir()
    (folder / "whole" / "config.json").write_text(json.dumps(config))
    recipe = load_recipe("W4A16", settings(folder / "model", "gptq"), nsamples=samples, seqlen=seqlen)
    start = time.perf_counter()
    prepared = prepare(folder / "whole", recipe, folder / "tokens.jsonl", read=False)
    seconds = time.perf_counter() - start
    if memory is None:
        return seconds, 0
    found = foretell(prepared)
    return seconds, sum(found.held(found.fitted(parse_memory(memory))).values())


def linears(size: str) -> list[tuple[int, int]]:
    """Return N and K of the linears of a layer, those with the same input as one."""
    shape = SHAPES[size]
    d, f = int(shape["hidden_size"]), int(shape["intermediate_size"])
    kv = d // int(shape["num_attention_heads"]) * int(shape["num_key_value_heads"])
    return [(d + 2 * kv, d), (d, d), (2 * f, d), (d, f)]


def layer_parameters(size: str) -> int:
    """Return the number of weights of a layer's linears."""
    return sum(N * K for N, K in linears(size))


def least_seconds(size: str, layers: int, tokens: int, roof: Roof) -> float:
    """Return what bytes over bandwidth, or operations over peak, take at least of the products of a whole run.

    Each linear runs once on all tokens; half of each Gram matrix is summed; errors are fed to half the columns, and to
    all of them in each sweep. Attention, factors, columns, reading and writing are left out.
    """
    microseconds = 0.0
    for N, K in linears(size):
        microseconds += Product(tokens, N, K).floor(roof) + Product(K, K, tokens).floor(roof) / 2
        microseconds += Product(N, K, K).floor(roof) * (0.5 + SWEEPS)
    return layers * microseconds * 1e-6
