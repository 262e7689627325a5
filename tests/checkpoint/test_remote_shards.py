"""A model on the hub of which few files are on disk: what is fetched, when, and that the result is the same."""

import json
import re

import huggingface_hub.constants
import pytest
import torch
from helpers import quantized_sources
from helpers.hub import running_hub
from helpers.quantized_sources import small_llama, tensors_of
from safetensors.torch import load_file, save_file

import quantize
from quantize.checkpoint.opening import open_checkpoint
from quantize.checkpoint.remote_shards import RemoteShards
from quantize.errors import QuantizeError, UsageError
from quantize.export.model_free import quantize as model_free
from quantize.export.model_free.files import write_file

LAYERS, FILES = 4, [f"model-{number:05}-of-00006.safetensors" for number in range(1, 7)]
IDS = torch.randint(2, 64, (4, 32), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def six(tmp_path):
    """Return a model of six files: the table of words, each of four layers, and what follows them."""
    directory = small_llama(tmp_path / "model", num_hidden_layers=LAYERS)
    tensors, places = tensors_of(directory), {}
    (directory / "model.safetensors").unlink()
    for name in tensors:
        layer = int(name.split(".")[2]) if ".layers." in name else None
        places[name] = FILES[0 if "embed" in name else 5 if layer is None else layer + 1]
    for file in FILES:
        save_file({n: x for n, x in tensors.items() if places[n] == file}, directory / file, {"format": "pt"})
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return directory


@pytest.fixture
def hub(six, tmp_path, monkeypatch):
    with running_hub(six, tmp_path / "cache", monkeypatch) as server:
        yield server


def weights_of(directory):
    return {path.name: path.read_bytes() for path in sorted(directory.glob("*.safetensors"))}


def int_in(pattern, text):
    return int(re.search(pattern, text)[1].replace(",", ""))


def on_disk(directory):
    """Return how many files with weights are no holes."""
    return sum(512 * path.stat().st_blocks >= path.stat().st_size for path in directory.glob("*.safetensors"))


def test_files_come_when_they_are_read_and_go_again(hub, six, tmp_path):
    here = open_checkpoint(six)
    with RemoteShards("org/model", tmp_path / "low") as remote:
        found = open_checkpoint(remote)
        assert not hub.sent
        assert found.stored_bytes() == here.stored_bytes()
        for name in sorted(found.sources):
            assert torch.equal(found.tensor(name), here.tensor(name)), name
            assert on_disk(remote.directory) <= 3
        found.seen.require_all_same()
        assert found.hub_id == "org/model"
        assert remote.peak <= sum(sorted(remote.sizes.values())[-3:]) + 6 * 4096
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("scheme", "recipe"),
    [("W4A16", {"quantizer": {"name": "rtn"}}), pytest.param("W4A8", {}, marks=pytest.mark.slow)],
)
def test_the_same_bytes_as_from_a_directory(hub, six, tmp_path, capsys, scheme, recipe):
    settings = {"scheme": scheme, "calibration": IDS, "seqlen": 32, "nsamples": 4, "group_size": 32, "recipe": recipe}
    quantize.quantize_model(six, output_dir=tmp_path / "here", **settings)
    quantize.quantize_model("org/model", output_dir=tmp_path / "far", low_disk=True, progress=True, **settings)
    assert weights_of(tmp_path / "far") == weights_of(tmp_path / "here")
    told = capsys.readouterr().err.replace("\n", " ")
    fetched, total = int_in(r"and ([\d,]+) were fetched", told), sum(map(len, weights_of(six).values()))
    assert fetched == total if scheme == "W4A16" else total < fetched <= 2 * total, told
    assert {path.name for path in tmp_path.iterdir()} == {"model", "here", "far"}
    assert set(hub.sent) == set(FILES)


def test_without_the_model_each_file_is_fetched_once(hub, six, tmp_path):
    settings = {"scheme": "W4A16", "group_size": 32, "recipe": {"quantizer": {"name": "rtn"}}}
    quantize.quantize_model_free(six, output_dir=tmp_path / "here", **settings)
    quantize.quantize_model_free("org/model", output_dir=tmp_path / "far", low_disk=True, **settings)
    assert weights_of(tmp_path / "far") == weights_of(tmp_path / "here")
    assert hub.sent == {file: len(hub.files[file]) for file in FILES}


def test_what_breaks_off_goes_on_and_what_is_slow_is_waited_for(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 16)
    hub.breaks, hub.slow = 1, 0.1
    with RemoteShards("org/model", tmp_path / "low") as remote:
        found = open_checkpoint(remote)
        found.tensor("model.layers.0.mlp.up_proj.weight")
        hub.slow = 0
    size = len(hub.files[FILES[1]])
    assert size + size // 2 <= hub.sent[FILES[1]] <= size + size // 2 + 16


def test_what_is_wrong_is_refused_and_fetched_anew(hub, tmp_path):
    hub.wrong = True
    with RemoteShards("org/model", tmp_path / "low") as remote:
        found = open_checkpoint(remote)
        with pytest.raises(
            QuantizeError, match=r"model-00006-of-00006.safetensors of org/model has not the SHA-256 that"
        ):
            found.tensor("model.norm.weight")
        hub.wrong = False
        assert found.tensor("model.norm.weight").shape == (64,)


def test_numbers_that_are_not_finite_are_refused_as_they_come(hub, six, small_run):
    name = "model.layers.2.mlp.up_proj.weight"
    tensors = load_file(six / FILES[3])
    tensors[name][3, 4] = torch.inf
    save_file(tensors, six / FILES[3], {"format": "pt"})
    hub.files[FILES[3]] = (six / FILES[3]).read_bytes()
    with pytest.raises(QuantizeError, match=rf"{name} holds inf at \[3, 4\]"):
        small_run("org/model", "W4A16", calibration=IDS, low_disk=True)


def test_a_dry_run_fetches_headers_alone(hub, tmp_path, cli):
    ids, options = tmp_path / "ids.jsonl", ("--low-disk", "--dry-run", "--scheme", "W4A16", "--group-size", "32")
    ids.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in IDS.tolist()))
    shown = cli("org/model", *options, "--seqlen", "32", "--calibration", ids)
    assert not hub.sent
    assert "more at most for files of the model, 3 at a time" in shown.out, shown.err
    assert "time: not measured without weights" in shown.out
    assert re.search(r"download: \S+ kB, each file once", shown.out)
    data = ("--seqlen", "32", "--calibration", ids)
    rotated = cli("org/model", *options[:2], "--scheme", "W4A8", *options[4:], *data)
    words = r"download: 1.13 MB at most, each of 6 files up to 2 times, as the whole model is read for a check of folds"
    assert re.search(words, rotated.out), rotated.out + rotated.err
    shown = cli("quantize", "--model-free", "org/model", *options)
    assert "bytes, where the model has" in shown.out, shown.err
    assert not hub.sent


PACKED = {"num_bits": 4, "type": "int", "strategy": "group", "symmetric": False, "group_size": 16}


@pytest.mark.parametrize(
    "make",
    [lambda d: quantized_sources.compressed(d, "pack-quantized", **PACKED), quantized_sources.gptq,
     quantized_sources.fp8, quantized_sources.mxfp4_experts],
)  # fmt: skip
def test_a_dry_run_of_a_quantized_source_fetches_headers_and_shapes_alone(tmp_path, monkeypatch, cli, make):
    directory, options = make(tmp_path / "model"), ("quantize", "--model-free", "--scheme", "W4A16", "--dry-run")
    here = cli(*options, directory, "--requantize").out
    with running_hub(directory, tmp_path / "cache", monkeypatch) as hub:
        shown = cli(*options, "org/model", "--low-disk")
    assert not hub.sent
    assert [line for line in shown.out.splitlines() if line in here.splitlines()] == here.splitlines(), shown.err


def test_a_model_that_is_here_needs_no_low_disk(six, tmp_path, cli):
    done = cli(six, "--low-disk", "--scheme", "W4A16", "-o", tmp_path / "out")
    assert (done.code, "--low-disk is for a model on the hub, and this one is here already" in done.err) == (2, True)
    with pytest.raises(UsageError, match="is for a model on the hub"):
        quantize.quantize_model_free(six, output_dir=tmp_path / "out", scheme="W4A16", low_disk=True)


@pytest.mark.usefixtures("hub")
def test_a_run_that_was_killed_goes_on(six, tmp_path, monkeypatch):
    settings = {"scheme": "W4A16", "group_size": 32, "recipe": {"quantizer": {"name": "rtn"}}, "low_disk": True}
    written, stop = [], [len(FILES) // 2]

    def killed(plan, directory, file, names):
        if len(written) == stop[0]:
            raise KeyboardInterrupt
        written.append(file)
        return write_file(plan, directory, file, names)

    monkeypatch.setattr(model_free, "write_file", killed)
    with pytest.raises(KeyboardInterrupt):
        quantize.quantize_model_free("org/model", output_dir=tmp_path / "far", **settings)
    assert (tmp_path / ".far.partial").is_dir()
    stop[0] = -1
    quantize.quantize_model_free("org/model", output_dir=tmp_path / "far", resume=True, **settings)
    assert written == FILES
    quantize.quantize_model_free(six, output_dir=tmp_path / "here", **settings | {"low_disk": False})
    assert weights_of(tmp_path / "far") == weights_of(tmp_path / "here")
