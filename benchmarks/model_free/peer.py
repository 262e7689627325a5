"""llm-compressor rounds the same files, in its own environment without this package."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from compressed_tensors.quantization import preset_name_to_scheme
from llmcompressor import model_free_ptq


def peak_memory() -> float:
    """Return the peak so far in MB of 10⁶ bytes, counted from `exec` on; getrusage would include the parent process."""
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024 / 1e6


def main(model: str, output: str, search: str) -> None:
    """Round to its W4A16, symmetric in groups of 128, by minima and maxima or with its search; print what it took."""
    interpreter, start, cpu = peak_memory(), time.perf_counter(), time.process_time()
    scheme = preset_name_to_scheme("W4A16", ["Linear"])
    scheme.weights.observer = "static_mse" if search == "mse" else "static_minmax"
    model_free_ptq(model, output, scheme=scheme, ignore=["model.embed_tokens", "lm_head"], device="cpu")
    spent = {"seconds": time.perf_counter() - start, "cpu": time.process_time() - cpu}
    print(json.dumps({**spent, "peak_mb": peak_memory(), "interpreter_mb": interpreter}))


if __name__ == "__main__":
    main(*sys.argv[1:])
