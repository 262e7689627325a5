"""One run of `bench_scale`, in a process of its own so that its peak memory is its own; prints JSON."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

from quantize.eval.scale_phases import gemm_peak, watch
from quantize.pipeline import quantize_model

RECIPES: dict[str, dict[str, Any]] = {
    "rtn": {"quantizer": {"name": "rtn"}},
    "gptq": {"quantizer": {"name": "gptq"}},
    "gptq-plain": {"quantizer": {"name": "gptq", "mse": False, "sweeps": 0}},  # what other tools call GPTQ
    "gptaq": {"quantizer": {"name": "gptaq"}},
}


def peak_memory() -> float:
    """Largest resident memory of this process until now, in MB of 10⁶ bytes; Linux counts it from `exec` on."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e6


def main(model: str, tokens: str, output: str, method: str, samples: str, seqlen: str) -> None:
    """Quantize to W4A16, symmetric in groups of 128 (or all columns if there are fewer)."""
    interpreter, phases = peak_memory(), watch()
    start, cpu = time.perf_counter(), time.process_time()
    config = json.loads((Path(model) / "config.json").read_text())
    group = 128 if config["hidden_size"] % 128 == 0 else 0
    recipe = {"passes": [], "weights": {"symmetric": True, "group_size": group}, **RECIPES[method]}
    quantize_model(model, output_dir=output, scheme="W4A16", recipe=recipe, calibration=tokens,
                   nsamples=int(samples), seqlen=int(seqlen))  # fmt: skip
    spent = {"seconds": time.perf_counter() - start, "cpu": time.process_time() - cpu}
    memory = {"peak_mb": peak_memory(), "interpreter_mb": interpreter}
    found = {name: dataclasses.asdict(phase) for name, phase in phases.phases.items()}
    gemm = dict(zip(("gemm", "gemm_cpu"), gemm_peak(), strict=True))
    print(json.dumps({**spent, **memory, **gemm, "phases": found}))


if __name__ == "__main__":
    main(*sys.argv[1:])
