"""`make bench-gguf` compares our GGUF files with llama.cpp's own: benchmarks/results/gguf.json and .md (resumes)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from benchmarks.machine import processor
from benchmarks.models.windows import WINDOWS, write_evaluation
from benchmarks.runtimes.peer import call
from benchmarks.runtimes.tiny_models import ROOT, TEXT
from quantize.checkpoint.checkpoint import Checkpoint
from quantize.checkpoint.opening import open_checkpoint
from quantize.export.directory import export_artifact
from quantize.export.gguf.blocks import Blocks
from quantize.export.gguf.export import write_gguf
from quantize.export.gguf.tensors import gguf_name, in_floating_point, name_map
from quantize.pipeline.quantize import quantize_model

PEER, RESULTS = "llama_cpp_peer", ROOT / "benchmarks/results/gguf.json"
FLOAT, PEERS = "BF16", ("Q4_0", "Q4_K_M")
PROMPT, DECODE, ROUNDS, ROWS = 128, 16, 3, 32
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
@click.option("--work-dir", "folder", type=click.Path(path_type=Path), required=True, help="Where files are kept.")
@click.option("--windows", "count", default=WINDOWS, show_default=True, help="Windows that are scored.")
def main(peer: str, model: Path, folder: Path, count: int) -> None:
    """Measure one model, and write the table anew; files that are in the folder are not made again."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (windows := folder / "windows.json").exists():
        write_evaluation(model, windows, [TEXT], windows=count)
    scored = json.loads(windows.read_text())["texts"][TEXT.stem]
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    found = results.setdefault(model.name, {"cpu": str(processor()), "windows": len(scored), "files": {}})["files"]

    def score_new() -> None:
        new = {name: str(path) for name, path in paths.items() if name not in found}
        scores = (
            call(peer, PEER, "score", reference=str(source), models=list(new.values()), windows=scored) if new else {}
        )
        for name, path in new.items():
            found[name] = {"bytes": Path(path).stat().st_size, **scores[path]}
        RESULTS.write_text(json.dumps(results, indent=2) + "\n")

    if not (source := folder / "float.gguf").exists():
        write_float(model, source)
    paths = {FLOAT: source}
    for kind in PEERS:
        paths[f"{kind} of llama.cpp"] = path = folder / f"{kind}.gguf"
        if not path.exists():
            call(peer, PEER, "quantize", source=str(source), output=str(path), kind=kind)
    paths["Q4_0 of ours"] = path = folder / "export" / "model.gguf"
    if not (artifact := folder / "artifact").exists():
        quantize_model(model, output_dir=artifact, scheme="W4A16", target="llama.cpp", nsamples=ROWS, seqlen=512)
    if not path.exists():
        export_artifact(artifact, "gguf", path.parent)
    score_new()
    models = {name: str(path) for name, path in paths.items()}
    speeds = call(peer, PEER, "speed", models=list(models.values()), prompt=PROMPT, decode=DECODE, rounds=ROUNDS)
    for name, file in models.items():
        found[name] |= speeds[file]
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
    lines = [NOTE.format(windows=first["windows"], rows=ROWS, rounds=ROUNDS, cpu=first["cpu"]).rstrip("\n")]
    for model, measured in results.items():
        files = measured["files"]
        base, peer = files[FLOAT], files["Q4_0 of llama.cpp"]
        for name, row in files.items():
            increase = f"loss {row['loss']:.4f}" if name == FLOAT else f"{row['loss'] - base['loss']:+.4f}"
            speed = " | ".join(f"{peer[key] / row[key]:.2f}" for key in ("prompt", "token"))
            size, scores = f"{row['bytes'] / 1e6:.1f}", f"{increase} | {row['kl']:.4f} | {row['top1']:.3f}"
            lines.append(f"| {model} | {name} | {size} | {scores} | {speed} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
