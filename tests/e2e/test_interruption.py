"""Ctrl-C at any moment of any command: a sentence within two seconds, and nothing half-written."""

from __future__ import annotations

import dataclasses
import functools
import os
import signal
import sys
import time

import pytest
from helpers.apart import run_apart

import quantize.eval.report  # noqa: F401  what is interrupted within an import cannot be imported again
from quantize.cli import main
from quantize.export.directory import export_artifact
from quantize.pipeline.quantize import collect_stats
from quantize.pipeline.statistics_files import write_collected
from quantize.recipe.recipe import load_recipe

pytestmark = pytest.mark.slow
SMALL = ["--scheme", "W8A8", "--group-size", "0", "--nsamples", "2", "--seqlen", "16"]
FIRST = 0.004  # seconds
COMMANDS = {
    "quantize": "{model} {small} -o out",
    "dry run": "{model} {small} --dry-run",
    "statistics": "{model} {small} --recipe {recipe} --collect-stats out",
    "merge-stats": "merge-stats {parts} --output out",
    "prune": "prune {mixture}/model --calibration {mixture}/ids.jsonl --ratio 0.5 --nsamples 2 --seqlen 16 -o out",
    "inspect": "inspect {model}",
    "eval": "eval {artifact} --against {model} --text {rows} --nsamples 8 --seqlen 64",
    "verify": "verify {artifact}",
    "report": "report {artifact} -o out",
    "run": "run {onnx} --prompt Once --max-new-tokens 200",
    "onnx": "export {artifact} --format onnx -o out",
    "safetensors-float": "export {artifact} --format safetensors-float -o out",
    "compressed-tensors": "export {artifact} --format compressed-tensors -o out",
}


@pytest.fixture(scope="module")
def files(one_layer, artifact_rtn, artifact_mixture, stories_calibration, tmp_path_factory):
    """Name → what the commands read."""
    folder = tmp_path_factory.mktemp("read")
    export_artifact(artifact_rtn.directory, "onnx", folder / "onnx")
    (folder / "recipe.toml").write_text('passes = [{ name = "smoothquant" }]\nquantizer = { name = "rtn" }\n')
    recipe = load_recipe("W8A8", folder / "recipe.toml", group_size=0, nsamples=2, seqlen=16)
    statistics = collect_stats(one_layer, output=folder / "stats", recipe=recipe, calibration=stories_calibration)
    parts, (size,) = [folder / f"part{n}" for n in range(20)], statistics.data.values()
    for part in parts:  # so many that merging takes longer than the system's clock of a process can tell
        write_collected(part, dataclasses.replace(statistics, data={part.name: size}))
    found = {"model": one_layer, "artifact": artifact_rtn.directory, "rows": stories_calibration}
    found |= {"mixture": artifact_mixture.directory.parent, "small": " ".join(SMALL)}
    found |= {"onnx": folder / "onnx", "parts": " ".join(map(str, parts))}
    return found | {"recipe": folder / "recipe.toml"}


@pytest.mark.parametrize("name", COMMANDS)
def test_ctrl_c_at_any_moment(name, files, tmp_path, monkeypatch):
    """The moments lie four times as far apart each time, in seconds of a core, until the command ends by itself."""
    moment, code = FIRST, 1
    monkeypatch.setattr(os, "_exit", sys.exit)  # an interrupted command leaves without taking Python apart
    monkeypatch.setattr(sys, "argv", ["quantize-model", *COMMANDS[name].format(**files).split()])
    while code:
        place = tmp_path / f"{moment:g}"
        place.mkdir()
        monkeypatch.chdir(place)
        shown = run_apart(functools.partial(interrupted, moment))
        code = shown.code
        if code:
            *_, told, seconds = shown.err.strip().splitlines()
            assert (code, told.partition(";")[0]) == (1, "interrupted"), (moment, shown)
            assert float(seconds) < 2, moment
            left = {path.name for path in place.iterdir()}
            kept = {"nothing was kept": set(), "out is complete": {"out"}}
            assert left == kept.get(told.partition("; ")[2], {".out.partial"}), (moment, told)
        moment *= 4
    assert moment > 4 * FIRST, "it ended before the first moment"


def interrupted(moment):
    """Run the command, interrupt it, and print how long it went on, in seconds of a core."""
    sent = []

    def interrupt(*_):
        sent.append(time.process_time())
        signal.raise_signal(signal.SIGINT)

    signal.signal(signal.SIGPROF, interrupt)
    signal.setitimer(signal.ITIMER_PROF, moment)
    try:
        main()
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(time.process_time() - sent[0] if sent else 0.0, file=sys.stderr)
