"""These are the engines that `bench_cpu` compares: how each gets its model, runs, and what it moves and computes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.scale.model import write_model, write_tokens
from quantize.checkpoint.opening import open_checkpoint
from quantize.export.directory import export_artifact
from quantize.export.onnx.export import export_onnx
from quantize.pipeline.quantize import quantize_model

SIZE, VOCABULARY = "1.1B untied", 32000
OURS, FLOAT, TORCH, GENAI, LLAMA = "ours", "ONNX Runtime float32", "torch bfloat16", "onnxruntime-genai", "llama.cpp"
PEER = Path(__file__).with_name("peer.py")
# The head is quantized too, as in llama.cpp and the builder; rounding by GPTQ would give the same speed.
RECIPE: dict[str, Any] = {
    "passes": [], "quantizer": {"name": "rtn"}, "ignore": [], "weights": {"symmetric": True, "group_size": 128},
}  # fmt: skip


@dataclass(frozen=True)
class Contender:
    """An engine with its model.

    Attributes:
        about: a description of what it runs.
        make: writes its model to a path, from the float model's directory.
        command: the command that measures it; path and numbers are appended.
        weight_bytes: the bytes of each weight, with its part of a scale, that are read for a token.
        products: the one of `ceilings` that bounds its products.
        scores_prompt: whether it scores each token of a prompt, not only the last one.
    """

    about: str
    make: Callable[[Path, Path], None]
    command: tuple[str, ...]
    weight_bytes: float
    products: str
    scores_prompt: bool


def contenders(peer: str | None) -> dict[str, Contender]:
    """Return all engines; those that need the peer's Python say so when they are made."""
    here, there = (sys.executable, "-m", "benchmarks.cpu.run"), (peer or "", str(PEER))
    return {
        OURS: Contender(
            "W4A8 in groups of 128, `--hybrid`", make_ours, (*here, "onnx"), 0.5 + 4 / 128, "int8", scores_prompt=True
        ),
        FLOAT: Contender("our export of the float model", make_float, (*here, "onnx"), 4, "float32", True),
        TORCH: Contender("transformers with a cache", link, (*here, "torch_bfloat16"), 2, "bfloat16", False),
        GENAI: Contender(
            "its builder's int4 in groups of 32, accuracy level 4", peer_makes(peer, "make_genai"),
            (*there, "genai"), 0.5 + 4 / 32, "int8", True,
        ),
        LLAMA: Contender(
            "Q4_0 in groups of 32, head included", peer_makes(peer, "make_llama"),
            (*there, "llama"), 18 / 32, "int8", False,
        ),
    }  # fmt: skip


def make_float_model(directory: Path, layers: int) -> int:
    """Write a random Llama; return the number of weights, the head's included, that a token is multiplied by."""
    parameters = write_model(directory, SIZE, layers)
    config = json.loads((directory / "config.json").read_text())
    return parameters - VOCABULARY * int(config["hidden_size"])


def make_ours(model: Path, path: Path) -> None:
    """Quantize with the pipeline, and export with `quantize-model export --hybrid`."""
    artifact, tokens = path.with_suffix(".artifact"), path.with_suffix(".jsonl")
    write_tokens(tokens, SIZE, 2, 32)
    quantize_model(
        str(model), scheme="W4A8", recipe=RECIPE, output_dir=artifact, calibration=tokens, nsamples=2, seqlen=32
    )
    export_artifact(artifact, "onnx", path, hybrid=True)


def make_float(model: Path, path: Path) -> None:
    """Export the float model; its 4.4 GB of weights are more than a protobuf file holds."""
    path.mkdir()
    (path / "config.json").write_bytes((model / "config.json").read_bytes())
    export_onnx(open_checkpoint(str(model)).load(), path)


def link(model: Path, path: Path) -> None:
    """Use the float model itself."""
    path.symlink_to(model)


def peer_makes(peer: str | None, command: str) -> Callable[[Path, Path], None]:
    """Return a function that lets the peer's environment write a model."""

    def make(model: Path, path: Path) -> None:
        if peer is None:
            raise FileNotFoundError("no --peer was given")
        run_command([peer, str(PEER), command, str(model), str(path)])

    return make


def run_command(command: list[str]) -> str:
    """Return the last line that a command prints.

    Raises:
        RuntimeError: the command failed; the message has the last line of its errors.
    """
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or [f"ended with {done.returncode}"])[-1])
    return (done.stdout.splitlines() or [""])[-1]
