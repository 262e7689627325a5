"""`pretend_run.py MODEL CALIBRATION OUT` quantizes on the CPU and on a pretended device, and prints JSON.

For each run of `RUNS`: which files differ, what moved, and what was alive on the device after each block.
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path
from typing import Any

import torch
from pretend_device import NAME, TRAFFIC, Pretended, register
from torch.nn.attention import SDPBackend, sdpa_kernel

from quantize.pipeline.quantize import quantize_model
from quantize.pipeline.sequential import SequentialPipeline
from quantize.quantizers import column_rounding

SMALL = {"nsamples": 4, "seqlen": 32}
PER_CHANNEL = {"weights": {"group_size": 0}}
ROTATED = [{"name": "fold_norms"}, {"name": "learned_rotation", "steps": 4}, {"name": "activation_clip"}]
SEARCHED = [{"name": "smoothquant"}, {"name": "adaptive_rotation"}, {"name": "runtime_smooth"}, {"name": "noisy_bias"}]
CACHED = {"prefix": {"tokens": [1]}, "kv_cache": {"num_bits": 4}}
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "W4A16": ("W4A16", PER_CHANNEL),
    "W4A4": ("W4A4", PER_CHANNEL),
    "NVFP4": ("NVFP4", {"targets": ["re:.*[qo]_proj"]}),
    "tuned": ("W4A4", PER_CHANNEL | {"passes": ROTATED, "tune": {"steps": 4}, **CACHED}),
    "searched": ("W4A4", PER_CHANNEL | {"passes": SEARCHED}),
}


def main(model: Path, calibration: Path, out: Path) -> dict[str, Any]:
    """Run all; attention is taken apart on both devices, as a device without a kernel for it takes it apart."""
    register()
    alive: list[int] = []
    process, leaf, scalars = SequentialPipeline.process, column_rounding.RecursiveUpdate.round_leaf, [0]

    def processed(self: SequentialPipeline, segment: Any, file: Any) -> Any:
        tensors = process(self, segment, file)
        gc.collect()
        alive.append(TRAFFIC.alive)
        return tensors

    def rounded(self: column_rounding.RecursiveUpdate, part: slice) -> None:
        before = TRAFFIC.scalars
        leaf(self, part)
        scalars[0] += TRAFFIC.scalars - before

    SequentialPipeline.process, column_rounding.RecursiveUpdate.round_leaf = processed, rounded  # type: ignore[method-assign]
    found = {}
    for name, (scheme, recipe) in RUNS.items():
        (out / name).mkdir(parents=True)
        arguments: dict[str, Any] = {"scheme": scheme, "recipe": recipe, "calibration": calibration, **SMALL}
        with sdpa_kernel(SDPBackend.MATH):
            expected = quantize_model(model, output_dir=out / name / "cpu", device="cpu", **arguments).directory
            alive.clear()
            TRAFFIC.to_device = TRAFFIC.to_cpu = TRAFFIC.peak = scalars[0] = 0
            with Pretended():
                made = quantize_model(model, output_dir=out / name / NAME, device=f"{NAME}:0", **arguments).directory
        files = sorted(expected.glob("*.safetensors"))
        found[name] = {
            "differ": [path.name for path in files if path.read_bytes() != (made / path.name).read_bytes()],
            "files": len(files),
            "to_device": TRAFFIC.to_device,
            "to_cpu": TRAFFIC.to_cpu,
            "peak": TRAFFIC.peak,
            "left": TRAFFIC.alive,
            "alive": list(alive),
            "artifact_bytes": sum(path.stat().st_size for path in files),
            "scalars_in_columns": scalars[0],
        }
    return found


if __name__ == "__main__":
    torch.manual_seed(0)
    print(json.dumps(main(*map(Path, sys.argv[1:]))))
