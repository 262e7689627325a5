"""What a device holds is foretold, what does not fit gives way, and a block that fills the device is tried again."""

import io

import pytest
import torch
from helpers.mixtures import build_family
from rich.console import Console
from safetensors.torch import load_file

from quantize.calibration.runner import SequentialRunner
from quantize.errors import QuantizeError, UsageError
from quantize.pipeline.block_loop import smaller
from quantize.pipeline.context import DeviceFullError
from quantize.pipeline.estimate.device_memory import foretell, limit_on, parse_memory, table
from quantize.pipeline.placement import Placement
from quantize.pipeline.prepare import prepare
from quantize.pipeline.quantize import quantize_model
from quantize.pipeline.sequential import SequentialPipeline
from quantize.recipe.recipe import load_recipe

SETTINGS = {"nsamples": 4, "seqlen": 16, "group_size": 0}
PLAIN = {"passes": [], "quantizer": {"name": "gptq"}}
SMOOTHED = {"passes": [{"name": "smoothquant"}], "quantizer": {"name": "rtn"}}
FULL = "CUDA out of memory. Tried to allocate 2.00 GiB."


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    directory = tmp_path_factory.mktemp("llama")
    build_family("mixtral", num_hidden_layers=1).config.save_pretrained(directory / "experts")
    model = build_family("mixtral", num_hidden_layers=1)
    model.save_pretrained(directory / "model")
    return directory / "model"


@pytest.fixture(scope="module")
def found(llama):
    rows = torch.arange(64).view(4, 16)
    return foretell(prepare(llama, load_recipe("W4A16", PLAIN, **SETTINGS), rows, read=False))


def size(found, placement):
    return sum(found.held(placement).values())


def test_what_gives_way_comes_in_order(found):
    everything, away = size(found, Placement()), size(found, Placement(0))
    alone = size(found, Placement(0, reads_ahead=False))
    apart = size(found, Placement(0, reads_ahead=False, together=False))
    least = size(found, Placement(0, reads_ahead=False, together=False, grams=False))
    assert found.fitted(everything) == Placement()
    assert found.fitted(everything - 1) == Placement(everything - 1 - away)
    assert found.fitted(away) == Placement(0)
    assert found.fitted(away - 1) == Placement(away - 1 - alone, reads_ahead=False)
    assert least <= apart <= alone < away < everything
    with pytest.raises(QuantizeError, match=r"does not fit into .* of the device's memory:\n(.*\n)*.*together\ngive a"):
        found.fitted(least - 1)


def test_the_table_has_a_line_for_each_figure(found):
    held = found.held(Placement())
    assert all(name in table(held) for name in held)
    assert table({"weights": 24 * 10**9, "work": 10**6}).splitlines()[-1] == "     24.0 GB  together"


def test_memory_is_given_as_people_write_it():
    assert parse_memory("24GB") == parse_memory("24 gb") == parse_memory("24000MB") == 24 * 10**9
    assert parse_memory("1.5GB") == 15 * 10**8
    for text in ("much", "-1GB", "0GB", "24GiB", ""):
        with pytest.raises(UsageError, match="is no size; give one such as 24GB"):
            parse_memory(text)
    assert limit_on("cuda", "2GB", 3) == 2 * 10**9
    assert limit_on("cuda", None, 3) == 3
    with pytest.raises(UsageError, match="--device-memory 2GB is for a device with memory of its own"):
        limit_on("cpu", "2GB", None)


@pytest.mark.slow
def test_a_dry_run_needs_no_device(llama, cli):
    options = ("--scheme", "W4A16", "--nsamples", 4, "--seqlen", 16, "--group-size", 0, "--dry-run", "-q")
    options += ("--device", "cuda", "--device-memory")
    shown = cli(llama.parent / "experts", *options, "24GB")
    assert "on cuda of 24.0 GB, not yet measured on a GPU:" in shown.out
    assert "the next block, as it is stored" in shown.out


def run(llama, output, monkeypatch, failures):
    """Quantize; the given numbers of calls of `process` find the device full when they are done."""
    process, calls, said = SequentialPipeline.process, [], io.StringIO()

    def filling(self, *arguments):
        made = process(self, *arguments)
        calls.append(len(calls))
        if calls[-1] in failures:
            raise torch.OutOfMemoryError(FULL)
        return made

    settings = {"scheme": "W8A8", "recipe": SMOOTHED, "calibration": torch.arange(128).view(8, 16) % 64}
    with monkeypatch.context() as patched:
        patched.setattr(SequentialPipeline, "process", filling)
        made = quantize_model(
            llama, output_dir=output, nsamples=8, seqlen=16, group_size=0, console=Console(file=said), **settings
        )
    return made.manifest["micro_batch"], " ".join(said.getvalue().split())


@pytest.mark.slow
def test_a_block_that_fills_the_device_is_tried_again_with_less(llama, tmp_path, monkeypatch):
    """The state is that before the block; extremes of activations do not depend on how many rows run together."""
    plain, _ = run(llama, tmp_path / "plain", monkeypatch, ())
    tried, told = run(llama, tmp_path / "tried", monkeypatch, (1, 2))
    [block] = tried["halved_before"]
    assert plain == tried | {"halved_before": []}
    for path in sorted((tmp_path / "plain").glob("*.safetensors")):
        ours = load_file(tmp_path / "tried" / path.name)
        for name, x in load_file(path).items():
            torch.testing.assert_close(ours[name], x, msg=name)
    assert f"{block} does not fit into the device's memory: fewer rows run together" in told
    assert f"{block} does not fit into the device's memory: calibration activations leave it" in told


def test_what_cannot_give_way_is_said_with_the_table():
    full = DeviceFullError("model.layers.3")
    assert smaller(Placement(), full, True, str).halved == ("model.layers.3",)
    assert smaller(Placement(), full, False, str) == Placement(0)
    with pytest.raises(QuantizeError, match=r"model.layers.3 does not fit .*foretold to hold:\nPlacement"):
        smaller(Placement(0), full, False, str)


def test_a_batch_is_split_by_what_the_graph_says(program):
    """Every value between the blocks of the first half is that of a run of the first half."""
    ids = torch.arange(5 * 8).view(5, 8)
    runner, first = SequentialRunner(program, [ids]), SequentialRunner(program, [ids[:3]])
    assert runner.halves
    assert runner.halve()
    assert [dict(shapes) for shapes in runner.shapes] == [{"input_ids": (3, 8)}, {"input_ids": (2, 8)}]
    for node, value in first.values[0].items():
        assert not isinstance(value, torch.Tensor) or torch.equal(runner.values[0][node], value)
