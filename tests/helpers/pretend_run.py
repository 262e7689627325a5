"""`pretend_run.py MODEL CALIBRATION OUT` quantizes on the CPU and on a pretended device, and prints JSON.

For each run of `RUNS`: which files differ, what moved, what was alive on the device after each block, and what was
foretold to be alive at most. MODEL is a Llama; the experts are made here. In the runs of `DELAYED` copies are late.
Each model is exported once on the CPU and once where the device exists, as an export takes longer than a run.
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path
from typing import Any

import torch
from exported_once import exporting_once
from mixtures import build_family
from pretend_device import NAME, TRAFFIC, Pretended, register
from safetensors.torch import load_file
from torch.nn.attention import SDPBackend, sdpa_kernel

from quantize.artifact.load import load
from quantize.graph import export
from quantize.pipeline import quantize, sequential
from quantize.pipeline.estimate import device_memory
from quantize.pipeline.placement import Placement
from quantize.pipeline.prepare import Prepared
from quantize.pipeline.quantize import quantize_model
from quantize.pipeline.sequential import SequentialPipeline
from quantize.pipeline.streams import Arriving, copies_for
from quantize.quantizers import column_rounding, gptaq, gptq, hessian

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
    "searched": ("W4A8", PER_CHANNEL | {"passes": SEARCHED}),
    "experts": ("W4A16", PER_CHANNEL),
    "panels": ("W4A8", PER_CHANNEL | {"passes": [], "quantizer": {"name": "gptaq", "ridge": 0.1}}),
    "budget": ("W4A16", {"average_bits": 5.5}),
}
DELAYED = {"W4A4", "experts"}
AHEAD = {"W4A16", "tuned"}  # whose next block arrives whenever the thread that reads it gets its turn


class LateCopies:
    """Copies that are made when they are waited for; until then their targets hold what no weight holds."""

    waited = 0

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def to_device(self, x: torch.Tensor) -> Arriving:
        return self._copy(x, self.device)

    def to_cpu(self, x: torch.Tensor) -> Arriving:
        return self._copy(x, torch.device("cpu"))

    def _copy(self, x: torch.Tensor, device: torch.device) -> Arriving:
        wrong = float("nan") if x.is_floating_point() else torch.iinfo(x.dtype).max
        target = torch.full(x.shape, wrong, dtype=x.dtype).to(device)

        def wait() -> torch.Tensor:
            LateCopies.waited += 1
            return target.copy_(x)

        return wait


def main(model: Path, calibration: Path, out: Path) -> dict[str, Any]:
    """Run all; attention is taken apart on both devices, as a device without a kernel for it takes it apart."""
    register()
    alive: list[int] = []
    process, leaf, scalars = SequentialPipeline.process, column_rounding.RecursiveUpdate.round_leaf, [0]
    foretold, back = [0], [0]

    def processed(self: SequentialPipeline, segment: Any, arriving: Any, file: Any) -> Any:
        before = TRAFFIC.to_cpu
        tensors = process(self, segment, arriving, file)
        back[0] += TRAFFIC.to_cpu - before
        gc.collect()
        alive.append(TRAFFIC.alive)
        return tensors

    def placed(*given: Any) -> Placement:
        prepared: Prepared = given[-1]
        placement = Placement(
            0 if name in ("searched", "panels") else None,
            reads_ahead=name in AHEAD,
            together=name not in ("experts", "panels"),
            grams=name != "panels",
        )
        foretold[0] = sum(device_memory.foretell(prepared).held(placement).values())
        return placement

    def rounded(self: column_rounding.RecursiveUpdate, part: slice) -> None:
        before = TRAFFIC.scalars
        leaf(self, part)
        scalars[0] += TRAFFIC.scalars - before

    factor, factored = hessian.factor, set[str]()

    def noted(H: torch.Tensor, *given: Any) -> torch.Tensor:
        factored.add(H.device.type)
        return factor(H, *given)

    gptq.factor = gptaq.factor = noted
    SequentialPipeline.process, column_rounding.RecursiveUpdate.round_leaf = processed, rounded  # type: ignore[method-assign]
    hessian.panels.__defaults__, hessian.ROWS, device_memory.ROWS = (16,), 32, 32  # of which there are several here
    quantize.placement_on, on_cpu, on_device = placed, *(exporting_once(export.export_program) for _ in range(2))
    build_family("mixtral", num_hidden_layers=1).save_pretrained(out / "mixtral")
    found = {}
    for name, (scheme, recipe) in RUNS.items():
        (out / name).mkdir(parents=True)
        rows = torch.arange(128).view(4, 32) % 64 if name == "experts" else calibration
        given = out / "mixtral" if name == "experts" else model
        sequential.copies_for = LateCopies if name in DELAYED else copies_for
        arguments: dict[str, Any] = {"scheme": scheme, "recipe": recipe, "calibration": rows, **SMALL}
        with sdpa_kernel(SDPBackend.MATH):
            export.export_program = on_cpu
            expected = quantize_model(given, output_dir=out / name / "cpu", device="cpu", **arguments).directory
            alive.clear()
            factored.clear()
            TRAFFIC.to_device = TRAFFIC.to_cpu = TRAFFIC.peak = scalars[0] = back[0] = LateCopies.waited = 0
            export.export_program = on_device
            with Pretended():
                made = quantize_model(given, output_dir=out / name / NAME, device=f"{NAME}:0", **arguments).directory
        files = sorted(expected.glob("*.safetensors"))
        found[name] = {
            "differ": [path.name for path in files if path.read_bytes() != (made / path.name).read_bytes()],
            "files": len(files),
            "to_device": TRAFFIC.to_device,
            "back": back[0],
            "late": LateCopies.waited,
            "peak": TRAFFIC.peak,
            "foretold": foretold[0],
            "left": TRAFFIC.alive,
            "alive": list(alive),
            "artifact_bytes": sum(path.stat().st_size for path in files),
            "packed_bytes": sum(packed_bytes(path) for path in files),
            "scalars_in_columns": scalars[0],
            "factored_on": sorted(factored),
        }
    return found | {"loaded": difference_of_loaded(out / "W4A16" / "cpu")}


def difference_of_loaded(artifact: Path) -> float:
    """Return by how much an artifact on the device gives other outputs than on the CPU."""
    ids = torch.arange(8)[None]
    with Pretended(), sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        found = load(artifact, device=f"{NAME}:0")(ids.to(f"{NAME}:0")).logits.cpu()
    with torch.no_grad():
        return float((found - load(artifact)(ids).logits).abs().max())


def packed_bytes(path: Path) -> int:
    """Return the bytes of the integers, scales and zero points in a file."""
    names = ("qweight", "scale", "zero_point")
    return sum(x.nbytes for name, x in load_file(path).items() if name.endswith(names))


if __name__ == "__main__":
    torch.manual_seed(0)
    print(json.dumps(main(*map(Path, sys.argv[1:]))))
