"""A run on another device than the CPU: the same bytes, nothing forgotten on the CPU, no growth from block to block."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.json_files import change_json
from safetensors import safe_open

from quantize.calibration.spill import SpilledTensor, SpillFile
from quantize.errors import QuantizeError, UsageError
from quantize.nn.device import resolve_device
from quantize.pipeline.quantize import running

HELPERS = Path(__file__).parents[1] / "helpers"
NAMES = ["W4A16", "W4A4", "NVFP4", "tuned", "searched", "experts", "panels", "budget"]


@pytest.fixture(scope="module")
def found(stories, stories_calibration, tmp_path_factory):
    """Run all in a process that has a pretended accelerator."""
    directory = tmp_path_factory.mktemp("device")
    model = directory / "model"
    model.mkdir()
    for path in stories.iterdir():
        (model / path.name).write_bytes(path.read_bytes())
    change_json(model / "config.json", num_hidden_layers=2)
    command = [sys.executable, HELPERS / "pretend_run.py", model, stories_calibration, directory / "out"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HELPERS), *sys.path])}
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_another_device_writes_the_same_bytes(found, name):
    assert found[name]["files"] == (4 if name == "experts" else 5)
    assert found[name]["differ"] == []


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_device_holds_no_more_than_was_foretold(found, name):
    assert found[name]["peak"] <= found[name]["foretold"] <= 2.5 * found[name]["peak"]
    assert found[name]["left"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["NVFP4", "searched"])
def test_nothing_piles_up_on_the_device(found, name):
    """A block leaves the activations that it was given room for; in these runs no block is read ahead."""
    head, first, *_ = found[name]["alive"]
    assert first <= 1.02 * head


@pytest.mark.slow
def test_gram_matrices_are_on_the_device_or_in_the_memory_of_the_machine(found):
    assert found["experts"]["factored_on"] == found["W4A16"]["factored_on"] == ["pretend"]
    assert found["panels"]["factored_on"] == ["cpu"]


@pytest.mark.slow
def test_an_artifact_is_loaded_onto_a_device(found):
    assert found["loaded"] < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("name", ["W4A4", "experts"])
def test_copies_that_are_late_are_waited_for(found, name):
    """In these runs each copy is made when it is waited for, and what nobody waits for is NaN."""
    assert found[name]["late"] > 30
    assert found[name]["differ"] == []


@pytest.mark.slow
def test_weights_cross_once_and_no_number_is_read_between_columns(found, one_layer):
    """W4A16 has no pass: the float32 weights cross, and what verification reads; only integers and scales come back."""
    with safe_open(one_layer / "model.safetensors", "pt") as file:
        sizes = {name: math.prod(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    floats = 4 * sum(n for name, n in sizes.items() if ".layers." not in name or re.search(r"layers\.[01]\.", name))
    given = found["W4A16"]
    assert floats < given["to_device"] < 2 * floats
    assert given["scalars_in_columns"] == 0
    assert given["back"] == given["packed_bytes"]


def test_a_full_device_is_said_to_be_full():
    full = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    with pytest.raises(
        QuantizeError, match=r"layers\.3 does not fit into the device's memory; give a smaller --seqlen"
    ):
        fail_in("model.layers.3", full)


def fail_in(name, error):
    with running(name):
        raise error


def test_devices_are_named():
    assert resolve_device("cpu") == resolve_device(torch.device("cpu")) == torch.device("cpu")
    for name in ("cuda:99", "abacus"):
        with pytest.raises(UsageError, match=f"--device {name}: torch finds no such device here; give cpu, cuda, "):
            resolve_device(name)


def test_a_tensor_comes_back_from_a_file_to_where_it_was(tmp_path):
    x = torch.arange(4096.0).reshape(64, 64)
    back = SpilledTensor.of(x, SpillFile(tmp_path)).read()
    assert torch.equal(back, x)
    assert back.device == x.device
