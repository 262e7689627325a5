"""`make bench-gguf` compares our GGUF files with llama.cpp's own: benchmarks/results/gguf.json and .md (resumes)."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from benchmarks.machine import processor
from benchmarks.models.windows import write_evaluation
from benchmarks.runtimes.peer import call
from benchmarks.runtimes.tiny_models import ROOT, TEXT
from quantize.checkpoint.checkpoint import Checkpoint, open_checkpoint
from quantize.export.directory import export_artifact
from quantize.export.gguf.blocks import Blocks
from quantize.export.gguf.export import write_gguf
from quantize.export.gguf.tensors import gguf_name, in_floating_point, name_map
from quantize.pipeline.quantize import quantize_model

PEER, RESULTS = "llama_cpp_peer", ROOT / "benchmarks/results/gguf.json"
PEERS = ("Q4_0", "Q4_K_M")
RECIPES: dict[str, dict[str, Any]] = {"Q4_0": {}, "Q4_1": {"weights": {"symmetric": False}}}
PROMPT, DECODE, ROUNDS = 128, 16, 5
NOTE = """\
`make bench-gguf` wrote this file and `gguf.json`. All files are run by llama.cpp on one thread and scored on {windows}
windows of 256 tokens of `tests/data/books/heldout.txt`. The increase of the loss (nats a token), the divergence (KL)
and the agreement on the first token are against the model in bfloat16, in llama.cpp too. Ours are calibrated on {rows}
windows of 512 tokens of the bundled prose. Speeds are parts of that of llama.cpp's Q4_0, by the best of {rounds} rounds
in turn, for a prompt of 128 tokens and for one token after it. {cpu}.

| model | file | MB | increase | KL | top-1 | prompt | token |
|---|---|---|---|---|---|---|---|
"""


@click.command()
@click.option("--peer", required=True, help="A Python with llama-cpp-python.")
@click.option("--model", type=click.Path(path_type=Path), required=True, help="The model's directory.")
@click.option("--artifact", "artifacts", type=(str, click.Path(path_type=Path)), multiple=True,
              help="A type and a finished artifact, which is then not made anew.")  # fmt: skip
@click.option("--rows", default=32, show_default=True, help="Calibration windows.")
@click.option("--windows", default=16, show_default=True, help="Windows that are scored.")
def main(peer: str, model: Path, artifacts: tuple[tuple[str, Path], ...], rows: int, windows: int) -> None:
    """Measure one model, and write the table anew."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        files = {"BF16": write_float(model, folder / "float.gguf")}
        for kind in PEERS:
            files[f"{kind} of llama.cpp"] = folder / f"{kind}.gguf"
            call(peer, PEER, "quantize", source=str(files["BF16"]), output=str(folder / f"{kind}.gguf"), kind=kind)
        for kind, recipe in RECIPES.items():
            given = dict(artifacts).get(kind) or quantize_model(
                model, output_dir=folder / kind, scheme="W4A16", target="llama.cpp", recipe=recipe, nsamples=rows,
                seqlen=512,
            ).directory  # fmt: skip
            export_artifact(given, "gguf", folder / f"our-{kind}")
            files[f"{kind} of ours"] = folder / f"our-{kind}" / "model.gguf"
        write_evaluation(model, folder / "windows.json", [TEXT], windows=windows)
        scored = json.loads((folder / "windows.json").read_text())["texts"][TEXT.stem]
        paths = {name: str(path) for name, path in files.items()}
        scores = call(peer, PEER, "score", reference=paths["BF16"], models=list(paths.values()), windows=scored)
        speeds = call(peer, PEER, "speed", models=list(paths.values()), prompt=PROMPT, decode=DECODE, rounds=ROUNDS)
        found = {name: {"bytes": files[name].stat().st_size, **scores[p], **speeds[p]} for name, p in paths.items()}
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results[model.name] = {"rows": rows, "windows": windows, "cpu": processor(), "files": found}
    RESULTS.write_text(json.dumps(results, indent=2) + "\n")
    RESULTS.with_suffix(".md").write_text(table(results))
    click.echo(table(results))


def write_float(model: Path, path: Path) -> Path:
    """Write a model's own weights, in the type in which they are stored."""
    checkpoint = open_checkpoint(model)
    config: Any = checkpoint.skeleton().config
    write_gguf(path, float_tensors(checkpoint, config.to_dict()), config.to_dict(), model)
    return path


def float_tensors(checkpoint: Checkpoint, config: dict[str, Any]) -> Iterator[tuple[str, Blocks]]:
    """Yield a model's parameters by their names in a file."""
    names = name_map(config)
    for name in checkpoint.sources:
        yield gguf_name(names, name), in_floating_point(name, checkpoint.tensor(name), config)


def table(results: dict[str, Any]) -> str:
    """Return the table of all models as Markdown."""
    first = next(iter(results.values()))
    lines = [NOTE.format(windows=first["windows"], rows=first["rows"], rounds=ROUNDS, cpu=first["cpu"]).rstrip("\n")]
    for model, measured in results.items():
        files = measured["files"]
        base, peer = files["BF16"], files["Q4_0 of llama.cpp"]
        for name, row in files.items():
            increase = f"loss {row['loss']:.4f}" if name == "BF16" else f"{row['loss'] - base['loss']:+.4f}"
            speed = " | ".join(f"{peer[key] / row[key]:.2f}" for key in ("prompt", "token"))
            size, scores = f"{row['bytes'] / 1e6:.1f}", f"{increase} | {row['kl']:.4f} | {row['top1']:.3f}"
            lines.append(f"| {model} | {name} | {size} | {scores} | {speed} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
