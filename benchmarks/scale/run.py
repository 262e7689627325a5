"""One run of `bench_scale` has a process of its own, and so its own peak of memory; it prints its estimate as well."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.scale.phases import product_rate, watch
from quantize.pipeline import block_loop, sequential
from quantize.pipeline.estimate.peak_memory import peak_memory
from quantize.pipeline.estimate.report import preflight
from quantize.pipeline.estimate.time import measure_time
from quantize.pipeline.overlap import WriteBehind
from quantize.pipeline.prepare import prepare
from quantize.pipeline.quantize import quantize_model
from quantize.recipe.recipe import load_recipe

RECIPES: dict[str, dict[str, Any]] = {
    "rtn": {"quantizer": {"name": "rtn"}},
    "gptq": {"quantizer": {"name": "gptq"}},
    "gptq-plain": {"quantizer": {"name": "gptq", "mse": False, "sweeps": 0}},  # called GPTQ by other tools
    "gptaq": {"quantizer": {"name": "gptaq"}},
}


IN_TURN = " in turn"  # behind the name of a method: one block after the other, without threads that read and write


class WriteInTurn(WriteBehind):
    """What is asked for is done before the caller goes on."""

    def do(self, job: Callable[[], None]) -> None:
        """Do it."""
        job()


def settings(model: Path, method: str) -> dict[str, Any]:
    """Return a recipe for W4A16, symmetric in groups of 128, or of all columns if there are fewer."""
    config = json.loads((model / "config.json").read_text())
    group = 128 if config["hidden_size"] % 128 == 0 else 0
    return {"passes": [], "weights": {"symmetric": True, "group_size": group}, **RECIPES[method.removesuffix(IN_TURN)]}


def foresee(model: str, tokens: str, method: str, samples: str, seqlen: str) -> None:
    """Print a dry run's estimates of the same run as JSON, in a process of its own, because it exports the model."""
    recipe = load_recipe("W4A16", settings(Path(model), method), nsamples=int(samples), seqlen=int(seqlen))
    prepared = prepare(Path(model), recipe, Path(tokens), read=False)
    found = preflight(prepared)
    memory = (peak_memory() + found.memory_bytes()) / 1e6
    seconds = measure_time(found, prepared.seconds).seconds
    print(json.dumps({"seconds": seconds, "peak_mb": memory, "artifact_mb": found.artifact_bytes() / 1e6}))


def main(model: str, tokens: str, output: str, method: str, samples: str, seqlen: str) -> None:
    """Quantize, and print what it took."""
    interpreter = peak_memory() / 1e6
    if method.endswith(IN_TURN):
        setattr(sequential, "read_ahead", lambda items, read: map(read, items))  # noqa: B010
        setattr(block_loop, "WriteBehind", WriteInTurn)  # noqa: B010
    start, cpu = time.perf_counter(), time.process_time()
    with watch() as phases:
        quantize_model(model, output_dir=output, scheme="W4A16", recipe=settings(Path(model), method),
                       calibration=tokens, nsamples=int(samples), seqlen=int(seqlen))  # fmt: skip
    spent = {"seconds": time.perf_counter() - start, "cpu": time.process_time() - cpu}
    memory = {"peak_mb": peak_memory() / 1e6, "interpreter_mb": interpreter}
    artifact = sum(path.stat().st_size for path in Path(output).rglob("*") if path.is_file()) / 1e6
    found = {name: dataclasses.asdict(phase) for name, phase in phases.phases.items()}
    print(json.dumps({**spent, **memory, "artifact_mb": artifact, "gemm_cpu": product_rate(), "phases": found}))


if __name__ == "__main__":
    foresee(*sys.argv[2:]) if sys.argv[1] == "--foresee" else main(*sys.argv[1:])
