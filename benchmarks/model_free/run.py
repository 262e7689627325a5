"""One run without the model's code has a process of its own, and so its own peak of memory."""

from __future__ import annotations

import json
import sys
import time

from quantize.export.model_free.quantize import quantize_model_free
from quantize.pipeline.estimate.peak_memory import peak_memory


def main(model: str, output: str, search: str) -> None:
    """Round to W4A16, symmetric in groups of 128, with or without a search for scales; print what it took."""
    interpreter, start, cpu = peak_memory() / 1e6, time.perf_counter(), time.process_time()
    recipe = {"quantizer": {"name": "rtn", "mse": search == "mse"}}
    quantize_model_free(model, output_dir=output, scheme="W4A16", recipe=recipe)
    spent = {"seconds": time.perf_counter() - start, "cpu": time.process_time() - cpu}
    print(json.dumps({**spent, "peak_mb": peak_memory() / 1e6, "interpreter_mb": interpreter}))


if __name__ == "__main__":
    main(*sys.argv[1:])
