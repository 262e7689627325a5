"""Integers speed up only the products of linears, so it is measured how much of a float model's time these take."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import onnxruntime

from benchmarks.cpu.encoder import read_batches

PRODUCTS = ("MatMul", "Gemm", "FusedMatMul")
Event = Mapping[str, Any]


def linears(path: str, batches: str) -> dict[str, float]:
    """Return the products' `part` of the time in [0, 1], and their floating-point `operations`, on all batches."""
    options = onnxruntime.SessionOptions()
    options.enable_profiling = True
    with tempfile.TemporaryDirectory() as folder:
        options.profile_file_prefix = str(Path(folder) / "profile")
        session = onnxruntime.InferenceSession(f"{path}/model.onnx", options, providers=["CPUExecutionProvider"])
        for feed in read_batches(Path(batches)):
            session.run(None, feed)
        return shares(json.loads(Path(session.end_profiling()).read_text()))


def shares(events: Iterable[Event]) -> dict[str, float]:
    """Return the same from ONNX Runtime's events."""
    nodes = [event for event in events if event.get("cat") == "Node" and event["name"].endswith("_kernel_time")]
    products = [event for event in nodes if event["args"]["op_name"] in PRODUCTS and operations(event)]
    part = sum(event["dur"] for event in products) / sum(event["dur"] for event in nodes)
    return {"part": part, "operations": float(sum(map(operations, products)))}


def operations(event: Event) -> int:
    """Return the operations of a product with a weight, which is packed and so is not among the listed inputs."""
    (given, *others), (made,) = event["args"]["input_type_shape"], event["args"]["output_type_shape"]
    K, shape = next(iter(given.values()))[-1], next(iter(made.values()))
    return 2 * K * math.prod(shape) if not others else 0


def fastest(part: float, operations: float, seconds: float, peak: float) -> float:
    """Return the largest speedup: products take `peak` operations a second, the rest of `seconds` stays (Amdahl)."""
    return seconds / (seconds * (1 - part) + operations / peak)
