"""`python -m benchmarks.expert_speed` times experts in ONNX Runtime: one `QMoE`, or a product for each expert.

Both files are made by the export's own code from the same random weights, W4A16 and W4A8 in groups of 32, and run one
after the other in turns on one thread.
"""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

import click
import onnxruntime
import torch
from torch import Tensor, nn
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from benchmarks.machine import best_of, processor
from quantize.export.onnx.fused_experts import fused
from quantize.export.onnx.gathered_experts import GatheredExperts
from quantize.export.onnx.lowering import lower
from quantize.export.onnx.tracing import OPSET
from quantize.graph.export import quiet
from quantize.nn.quantized_experts import QuantizedExperts, replace_parameter
from quantize.quantizers.rtn import RoundToNearest
from quantize.scheme.scheme import ActivationArgs, Scheme, WeightArgs

SHAPES = ((8, 2, 512, 1024), (64, 8, 1024, 512), (128, 8, 2048, 768))  # experts, k, hidden, intermediate size
TOKENS = (1, 8, 256)
WEIGHTS = WeightArgs(num_bits=4, group_size=32)
HEAD = [
    "| experts | top | sizes | scheme | tokens | QMoE, ms | each, ms | QMoE / each |",
    "|---|---|---|---|---|---|---|---|",
]


def layer(experts: int, k: int, hidden: int, inner: int, scheme: Scheme) -> Qwen3MoeExperts:
    """Return a layer of random experts, quantized."""
    config = Qwen3MoeConfig(hidden_size=hidden, moe_intermediate_size=inner, num_experts=experts, num_experts_per_tok=k)
    config._experts_implementation = "batched_mm"
    made = Qwen3MoeExperts(config)
    for name, N, K in (("gate_up_proj", 2 * inner, hidden), ("down_proj", hidden, inner)):
        W = torch.randn(experts * N, K, generator=torch.Generator().manual_seed(0)) / K**0.5
        weight = RoundToNearest().quantize(W, scheme.weights, None, torch.float32)
        replace_parameter(made, name, QuantizedExperts(weight, None, scheme, (), experts))
    return made.eval()


def session(module: nn.Module, feed: tuple[Tensor, ...], directory: Path) -> onnxruntime.InferenceSession:
    """Return a session that runs a module on one thread with any number of tokens."""
    path, tokens = directory / "model.onnx", {0: torch.export.Dim.DYNAMIC}
    with quiet():
        torch.onnx.export(module.eval(), feed, path, input_names=["x", "numbers", "weights"], opset_version=OPSET,
                          verbose=False, dynamic_shapes=(tokens, tokens, tokens))  # fmt: skip
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(path, options)


def routed(tokens: int, experts: int, k: int, hidden: int) -> dict[str, Any]:
    """Return random rows with the numbers and weights of their experts."""
    generator = torch.Generator().manual_seed(tokens)
    weights, numbers = torch.rand(tokens, experts, generator=generator).topk(k, dim=1)
    x = torch.randn(tokens, hidden, generator=generator)
    return {"x": x.numpy(), "numbers": numbers.numpy(), "weights": weights.numpy()}


@click.command()
@torch.no_grad()
def main() -> None:
    """Print the table."""
    click.echo(f"{processor()}\n\n{HEAD}")
    for experts, k, hidden, inner in SHAPES:
        for label, activations in (("W4A16", None), ("W4A8", ActivationArgs(num_bits=8))):
            each = layer(experts, k, hidden, inner, Scheme(weights=WEIGHTS, activations=activations))
            whole = fused(each, lower)
            assert whole is not None
            for name in ("gate_up_proj", "down_proj"):
                replace_parameter(each, name, GatheredExperts(getattr(each, name), lower))
            feed = tuple(map(torch.from_numpy, routed(4, experts, k, hidden).values()))
            with tempfile.TemporaryDirectory() as folder:
                sessions = [session(module, feed, Path(folder)) for module in (whole, each)]
            for tokens in TOKENS:
                given = routed(tokens, experts, k, hidden)
                runs = [functools.partial(found.run, None, given) for found in sessions]
                turns = [[best_of(run, 3) for run in runs] for _ in range(3)]
                a, b = (1e3 * min(seconds) for seconds in zip(*turns, strict=True))
                cells = (experts, k, f"{hidden}, {inner}", label, tokens, f"{a:.2f}", f"{b:.2f}", f"{a / b:.2f}")
                click.echo("| " + " | ".join(map(str, cells)) + " |")


if __name__ == "__main__":
    main()
