"""One measurement of `bench_cpu` runs in a process of its own and prints JSON as its last line."""

from __future__ import annotations

import functools
import inspect
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.cpu.node_times import linears
from benchmarks.cpu.peer import Step, timed
from benchmarks.machine import best_of
from quantize.export.onnx.runtime.decoder_session import OnnxDecoder
from quantize.export.onnx.runtime.session import session_of
from quantize.nn.prefix_hooks import CACHES

REPEATS = 20
LARGE_BUFFER = 1 << 30  # bytes, more than a last-level cache holds


def onnx(path: str) -> Step:
    """Run ONNX Runtime as `quantize-model run` does."""
    model = OnnxDecoder(Path(path))
    cache = [model.start()]

    def step(tokens: list[int]) -> None:
        _, cache[0] = model.step(tokens, cache[0] if len(tokens) == 1 else model.start())

    return step


def torch_bfloat16(path: str) -> Step:
    """Run transformers with a cache as `generate` does."""
    from transformers import AutoModelForCausalLM, DynamicCache

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()
    cache, taken = [DynamicCache()], inspect.signature(model.forward).parameters
    argument = next(name for name in CACHES if name in taken)

    @torch.no_grad()
    def step(tokens: list[int]) -> None:
        if len(tokens) > 1:
            cache[0] = DynamicCache()
        model(input_ids=torch.tensor([tokens]), **{argument: cache[0]}, use_cache=True, logits_to_keep=1)

    return step


def encoder(path: str, batches: str, repeats: str) -> dict[str, Any]:
    """Return the seconds that all batches of tokenized sentences took, in each repetition."""
    from benchmarks.cpu.encoder import read_batches

    session, feeds, found = session_of(Path(path)), read_batches(Path(batches)), list[float]()
    for _ in range(int(repeats) + 1):
        start = time.perf_counter()
        for feed in feeds:
            session.run(None, feed)
        found.append(time.perf_counter() - start)
    return {"seconds": found[1:]}


def ceilings() -> dict[str, float]:
    """Return the machine's best rates: bytes read in a second, and operations of products in a second.

    Products of integers are ONNX Runtime's `MatMulInteger`, and those of floats are torch's.
    """
    buffer = torch.zeros(LARGE_BUFFER // 8, dtype=torch.int64)
    size = 2048
    operations = 2 * 512 * size * size
    bandwidth, integers = LARGE_BUFFER / best_of(buffer.sum, REPEATS), best_of(integer_product(512, size), REPEATS)
    found = {"bytes": bandwidth, "int8": operations / integers}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = torch.ones(512, size, dtype=dtype), torch.ones(size, size, dtype=dtype)
        found[str(dtype).removeprefix("torch.")] = operations / best_of(functools.partial(torch.matmul, a, b), REPEATS)
    return found


def integer_product(rows: int, size: int) -> Any:
    """Return a call that multiplies uint8 [rows, size] by int8 [size, size]."""
    import onnxruntime
    from onnx import helper, numpy_helper
    from onnx.onnx_pb import TensorProto

    weight = numpy_helper.from_array(np.ones((size, size), np.int8), "w")
    zero = numpy_helper.from_array(np.array(128, np.uint8), "z")
    nodes = [helper.make_node("MatMulInteger", ["x", "w", "z"], ["p"]), helper.make_node("ReduceMax", ["p"], ["y"])]
    x = helper.make_tensor_value_info("x", TensorProto.UINT8, [rows, size])
    y = helper.make_tensor_value_info("y", TensorProto.INT32, None)
    graph = helper.make_graph(nodes, "product", [x], [y], [weight, zero])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    feed = {"x": np.ones((rows, size), np.uint8)}
    return lambda: session.run(None, feed)


def main(command: str, *arguments: str) -> None:
    """Run one of these measurements.

    onnx|torch_bfloat16 PATH VOCABULARY PROMPT DECODE REPEATS
    encoder PATH BATCHES REPEATS
    linears PATH BATCHES
    ceilings
    """
    if command in ("onnx", "torch_bfloat16"):
        path, *numbers = arguments
        step = (onnx if command == "onnx" else torch_bfloat16)(path)
        found = timed(step, *map(int, numbers))
    else:
        commands: dict[str, Callable[..., Any]] = {"encoder": encoder, "linears": linears, "ceilings": ceilings}
        found = commands[command](*arguments)
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
