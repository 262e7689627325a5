"""`make bench-engine` compares the speed of loaded artifacts on a CPU with that of the float model in float32.

Every scheme is rounded plainly, with a Hadamard transform in front of every linear where its format takes one, which
is the most work that an artifact has on a CPU. Float model and artifact run in turn, and the medians are compared.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from quantize.artifact.load import load
from quantize.checkpoint.opening import open_checkpoint
from quantize.formats import FORMATS
from quantize.pipeline.quantize import quantize_model
from quantize.scheme.scheme import ENGINES

MODEL = Path(__file__).resolve().parents[1] / "tests" / "models" / "books-llama-6m"
SCHEMES = ("W8A8", "W4A8", "W4A4", "W4A16", "MXFP4", "NVFP4")
TOKENS, STEPS = 256, 32  # of the prompt, and decoded behind it
PROMPTS = 7
HADAMARD = {"name": "rotate", "residual": False, "heads": False}


def main(model: Path) -> None:
    """Print for each scheme and engine the speed as a part of float32's, in prefill and in decoding."""
    reference, table = open_checkpoint(model).load(), Table("scheme", "engine", "prefill", "decode")
    with tempfile.TemporaryDirectory() as scratch:
        for scheme in SCHEMES:
            directory = quantized(model, scheme, Path(scratch) / scheme)
            for engine in ENGINES:
                found = ratios(reference, load(directory, engine=engine))
                table.add_row(scheme, engine, *(f"{ratio:.2f}" for ratio in found))
    console = Console()
    console.print(f"{model.name}, {torch.get_num_threads()} threads: speed relative to float32, {TOKENS} tokens")
    console.print(table)


def quantized(model: Path, scheme: str, output: Path) -> Path:
    """Quantize a model and return the artifact's directory."""
    number_format = FORMATS[scheme.lower()] if scheme.lower() in FORMATS else FORMATS["int"]
    passes = [] if number_format.rotation_block is None else [HADAMARD]
    recipe: dict[str, Any] = {"passes": passes, "quantizer": {"name": "rtn"}}
    return quantize_model(model, scheme=scheme, output_dir=output, recipe=recipe).directory


@torch.no_grad()
def ratios(reference: nn.Module, model: nn.Module) -> tuple[float, float]:
    """Return how fast a model is, relative to the reference, on a prompt and on each token behind it."""
    models = (reference, model)
    ids = torch.randint(reference.config.vocab_size, (1, TOKENS), generator=torch.Generator().manual_seed(0))  # type: ignore[union-attr, arg-type]
    caches = [m(input_ids=ids, use_cache=True).cache for m in models]  # and the weights are held now
    prefill = interleaved([lambda m=m: m(input_ids=ids) for m in models], PROMPTS)  # type: ignore[misc]
    steps = [step(m, ids[:, -1:], cache) for m, cache in zip(models, caches, strict=True)]
    return prefill, interleaved(steps, STEPS)


def step(model: nn.Module, ids: Tensor, cache: Any) -> Callable[[], Any]:
    """Return a function that runs the next token, which the cache then holds."""
    return lambda: model(input_ids=ids, cache=cache, use_cache=True)


def interleaved(functions: Sequence[Callable[[], Any]], count: int) -> float:
    """Run two functions in turn, each `count` times, and return the first one's median time over the second one's."""
    times: list[list[float]] = [[], []]
    for _ in range(count):
        for function, taken in zip(functions, times, strict=True):
            start = time.perf_counter()
            function()
            taken.append(time.perf_counter() - start)
    first, second = map(statistics.median, times)
    return first / second


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else MODEL)
