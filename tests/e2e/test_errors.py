"""Bad input, full disks and interruptions: one clear sentence, the right exit code, and nothing left behind."""

from __future__ import annotations

import errno
import json
import pickle
import resource
import socket
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import huggingface_hub.errors as hub_errors
import pytest
import torch
from helpers.json_files import change_json
from safetensors.torch import load_file, save_file

from quantize.errors import UsageError
from quantize.export.directory import export_artifact

UP = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture
def refused(cli, stories_calibration, tmp_path, tree):
    """Quantize something wrong: exit code and the sentence, and the check that nothing was left behind; a function."""

    def run(model, *arguments, scheme="W8A8", output="out", keeps=False):
        before = tree(tmp_path)
        data = ["--calibration", stories_calibration, "--nsamples", 2, "--seqlen", 16]
        shown = cli(model, "--scheme", scheme, *data, "--output-dir", tmp_path / output, *arguments)
        kept = {path for path in tree(tmp_path) if not path.startswith(".out.partial")} if keeps else tree(tmp_path)
        assert kept == (before.keys() if keeps else before)
        *progress, sentence = shown.err.strip().splitlines()
        steps = ("checking folds of ", "surveying ", "quantizing ", "verifying ")
        assert all(line.startswith(steps) or "tensors of the files have no place" in line for line in progress)
        assert sentence.startswith("error: ")
        assert not shown.out
        return shown.code, sentence

    return run


def weights(model):
    return load_file(model / "model.safetensors")


def with_weights(model, changes):
    save_file(weights(model) | changes, model / "model.safetensors", {"format": "pt"})
    return model


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("./missing", "no such model directory: ./missing"),
        ("missing-model", "missing-model is no directory here, and the hub cannot be reached to fetch it"),
    ],
)
def test_a_missing_model(refused, model, words):
    code, sentence = refused(model)
    assert code == 2
    assert words in sentence


@pytest.mark.parametrize("keep", [0.5, 0.001, 0])
def test_truncated_weights(refused, variant, keep):
    path = variant() / "model.safetensors"
    path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])
    code, sentence = refused(path.parent)
    assert code == 1
    assert f"{path} is truncated or no safetensors file" in sentence


@pytest.mark.parametrize("values", [[float("nan")], [float("inf")], [-float("inf")], [float("inf"), -float("inf")]])
def test_a_weight_that_is_not_finite_is_named(refused, variant, values):
    model = variant()
    weight = weights(model)[UP]
    weight[7, 3 : 3 + len(values)] = torch.tensor(values)
    code, sentence = refused(with_weights(model, {UP: weight}))
    assert code == 1
    assert f"{UP} holds {values[0]} at [7, 3]" in sentence


def test_weights_that_do_not_fit_the_config(refused, variant):
    assert refused(variant("a", intermediate_size=100))[1].startswith("error: model.layers.0.mlp.gate_proj.weight has")
    assert "holds no tensor model.layers.5." in refused(variant("b", num_hidden_layers=6))[1]
    code, sentence = refused(with_weights(variant("c"), {UP: torch.ones(172, 64, dtype=torch.int8)}))
    assert code == 1
    assert f"{UP} is of torch.int8; only floating-point weights" in sentence


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"architectures": None, "model_type": "x"}, "config.json names no architecture, and its model_type is 'x'"),
        ({"architectures": ["NoSuchModel"]}, "has no NoSuchModel"),
        ({"architectures": ["AutoModelForCausalLM"]}, "has no AutoModelForCausalLM"),
        ({"num_hidden_layers": "five"}, "the config does not build a LlamaForCausalLM: "),
        ({"num_attention_heads": 7}, "the config does not build a LlamaForCausalLM: "),
        ({"hidden_act": "no_such"}, "the config does not build a LlamaForCausalLM: "),
        ({"quantization_config": {"quant_method": "gptq"}}, "is quantized by gptq, says its config, but its"),
    ],
)
def test_a_config_that_cannot_be_used(refused, variant, config, words):
    code, sentence = refused(variant(**config))
    assert code == 2
    assert words in sentence


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("config.json", "{", "config.json is no JSON"),
        ("config.json", None, "holds no config.json"),
        ("model.safetensors", None, "holds no .safetensors weights"),
        ("tokenizer.json", "{", "the tokenizer in"),
    ],
)
def test_a_damaged_or_missing_file(refused, variant, name, content, words):
    path = variant() / name
    path.unlink() if content is None else path.write_text(content)
    code, sentence = refused(path.parent)
    assert code in (1, 2)
    assert words in sentence


def test_a_group_size_that_does_not_divide_names_the_layer(refused, one_layer):
    code, sentence = refused(one_layer, "--group-size", 128, scheme="W4A16")
    assert code == 2
    assert "group size 128 does not divide the 64 columns of model.layers.0.self_attn.q_proj and of 6 more" in sentence
    sentence = refused(one_layer, "--group-size", 16)[1]
    assert "the 172 columns of model.layers.0.mlp.down_proj;" in sentence


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--seqlen", 513], 2, "--seqlen 513 is more than the 512 positions of the model"),
        (["--recipe", "absent.toml"], 2, "no such recipe: absent.toml"),
        (["--calibration", "absent.txt"], 2, "no such file: absent.txt"),
        (["--calibration", "empty.txt"], 1, "holds 0 tokens, less than one window of 16"),
        (["--calibration", "short.txt"], 1, "tokens, less than one window of 16; give more text or a smaller --seqlen"),
    ],
)
def test_options_and_data_that_do_not_fit(refused, one_layer, tmp_path, monkeypatch, arguments, code, words):
    for name, content in {"empty.txt": "", "short.txt": "Once upon"}.items():
        (tmp_path / name).write_text(content)
    monkeypatch.chdir(tmp_path)
    found = refused(one_layer, *arguments)
    assert found[0] == code
    assert words in found[1]


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (hub_errors.GatedRepoError, "org/model is gated: accept its terms on the hub, and log in with `hf auth login`"),
        (hub_errors.RepositoryNotFoundError, "the hub has no model of that id for you"),
        (hub_errors.LocalEntryNotFoundError, "the hub cannot be reached to fetch it; give a model's directory"),
    ],
)
@pytest.mark.parametrize("asked", ["get_hf_file_metadata", "snapshot_download"])
def test_the_hub_refuses_for_one_reason(refused, monkeypatch, error, words, asked):
    def fail(*_, **__):
        raise error.__new__(error)

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", lambda *_, **__: None)
    monkeypatch.setattr(huggingface_hub, asked, fail)
    code, sentence = refused("org/model")
    assert code == 2
    assert words in sentence


def test_an_export_is_no_artifact_but_is_measured(cli, artifact_rtn, books_heldout, tmp_path):
    export_artifact(artifact_rtn, "compressed-tensors", tmp_path / "ct")
    export_artifact(artifact_rtn, "safetensors-float", tmp_path / "float")
    shown = cli("verify", tmp_path / "ct")
    assert shown.code == 2
    assert "ct is an export for 'compressed-tensors'; give the artifact that it was made of" in shown.err
    few = ["--text", books_heldout, "--nsamples", 1, "--seqlen", 16, "--json"]
    losses = [json.loads(cli("eval", tmp_path / name, *few).out)["loss"] for name in ("float", "ct")]
    own = json.loads(cli("eval", artifact_rtn.directory, *few).out)
    assert losses == pytest.approx([own["loss"]] * 2, rel=1e-5)
    change_json(tmp_path / "ct" / "config.json", architectures=["NoSuchModel"])
    assert "is of a class that transformers does not have" in cli("eval", tmp_path / "ct", *few).err
    change_json(
        tmp_path / "ct" / "config.json",
        architectures=["LlamaForCausalLM"],
        quantization_config={"quant_method": "compressed-tensors", "format": "no such format"},
    )
    assert "ct holds nothing that transformers takes for model.layers.0" in cli("eval", tmp_path / "ct", *few).err
    (tmp_path / "ct" / "model.safetensors.index.json").write_text("{}")
    assert cli("eval", tmp_path / "ct", *few).code == 1


def test_a_finished_run_is_not_resumed(refused, small_run, one_layer):
    small_run(one_layer, "W8A8", recipe={"passes": [], "quantizer": {"name": "rtn"}})
    code, sentence = refused(one_layer, "--resume")
    assert code == 2
    assert "out is finished, so there is nothing to go on with; leave --resume out" in sentence


def test_parents_made_for_the_output_go_too(refused, one_layer):
    assert refused(one_layer, "--group-size", 7, output="new/deeper/out")[0] == 2


@pytest.mark.parametrize("kind", ["directory", "file", "dangling link"])
def test_what_exists_stays_as_it_is(refused, one_layer, tmp_path, kind):
    output = tmp_path / "out"
    if kind == "directory":
        output.mkdir()
        (output / "precious.txt").write_text("mine")
    else:
        output.write_text("mine") if kind == "file" else output.symlink_to(one_layer.with_name("nowhere"))
    code, sentence = refused(one_layer)
    assert code == 2
    assert f"{output} exists already" in sentence
    assert output.is_symlink() == (kind == "dangling link")


def test_the_function_raises_what_the_command_prints(small_run, one_layer, tmp_path):
    for wrong in ({"scheme": "W3A3"}, {"seqlen": 600}, {"ignore": ["q_prj"]}):
        with pytest.raises(UsageError):
            small_run(one_layer, **wrong)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def largest_file():
    """Let no file grow beyond so many bytes, as a full disk would; a function."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.slow
@pytest.mark.parametrize("size", [1_000, 35_300])
def test_a_disk_that_is_full(refused, one_layer, largest_file, tmp_path, size):
    largest_file(size)  # the first file fails; only the last one with weights fails
    code, sentence = refused(one_layer, "--group-size", 0, "--recipe", "w4a4-folded", scheme="W4A4", keeps=True)
    assert code == 1
    assert f"{tmp_path / 'out'} was not made" in sentence


@pytest.mark.parametrize("step", ["save_file", "flush", "Path.write_bytes", "Path.mkdir"])
def test_no_space_left_on_the_device(refused, one_layer, monkeypatch, step):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(f"quantize.artifact.writer.{step}", full)
    code, sentence = refused(one_layer, keeps=step == "Path.write_bytes")
    assert code == 1
    assert "the disk is full" in sentence


def test_code_from_a_model_is_never_run(cli, refused, variant, stories_calibration, sts, tmp_path, monkeypatch):
    """Neither what the config names, nor what the tokenizer names, nor a pickle; and nobody is asked to."""
    model, proof = variant(auto_map={"AutoConfig": "evil.E", "AutoModelForCausalLM": "evil.E"}), tmp_path / "proof"
    (model / "evil.py").write_text(f"open({str(proof)!r}, 'w')\nclass E:\n    pass\n")
    changed = {"tokenizer_class": "E", "auto_map": {"AutoTokenizer": ["evil.E", "evil.E"]}}
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    monkeypatch.setattr("sys.stdin", None)
    assert cli("inspect", model, "--json").code == 0
    output = tmp_path / "fine"
    data = ["--calibration", stories_calibration, "--nsamples", 2, "--seqlen", 16]
    assert cli(model, "--scheme", "W8A8", *data, "--output-dir", output).code == 0
    assert not (output / "evil.py").exists()
    (model / "tokenizer_config.json").write_text(json.dumps(changed))
    assert "the tokenizer in" in refused(model)[1]
    for text in (stories_calibration, sts[0]):
        assert cli("eval", model, "--text", text).code in (1, 2)
    recipe = tmp_path / "recipe.toml"
    recipe.write_text("trust_remote_code = true")
    assert "trust_remote_code: there is no such key here" in refused(model, "--recipe", recipe)[1]
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(pickle.dumps(Evil(proof)))
    assert "holds no .safetensors weights" in refused(model)[1]
    assert not proof.exists()


class Evil:
    def __init__(self, proof):
        self.proof = str(proof)

    def __reduce__(self):
        return Path(self.proof).touch, ()


@pytest.fixture
def asked(monkeypatch):
    """Hosts that were asked for, with the hub's offline switch off and no network."""
    hosts = []

    def refuse(host, *_, **__):
        hosts.append(host)
        raise socket.gaierror(socket.EAI_NONAME, "no network in this test")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    return hosts


@pytest.mark.slow
def test_a_local_directory_never_touches_the_network(asked, cli, small_run, one_layer, minilm, tmp_path):
    small_run(one_layer, "W8A8", calibration=None)
    few = tmp_path / "few.tsv"
    few.write_text("1\ta dog\ta cat\n2\ta man\ta boy\n3\tthe sea\tthe ocean\n")
    assert cli("eval", minilm, "--text", few).code == 0
    assert not asked
    assert cli("no-such/model", "--scheme", "W8A8", "--output-dir", tmp_path / "hub").code == 2
    assert 0 < len(asked) <= 2  # so the check above can fail; and nobody waits while the hub is asked again and again


def test_an_output_that_is_the_root(refused, one_layer):
    assert refused(one_layer, output="/") == (2, "error: / exists already; give a new --output-dir")


@pytest.mark.slow
def test_a_limit_on_the_size_of_files(one_layer, tmp_path):
    command = [sys.executable, "-m", "quantize", one_layer, "--scheme", "W8A8", "--output-dir", tmp_path / "out"]
    limited = ["bash", "-c", 'ulimit -f 0; exec "$@"', "bash", *map(str, command)]
    done = subprocess.run(limited, capture_output=True, text=True, timeout=170)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(30, "Read-only file system", "/there/x"), "error: /there/x: Read-only file system; give a place that"),
        (FileNotFoundError("No usable temporary directory found"), "error: No usable temporary directory found; give"),
        (MemoryError(), "error: there is not enough memory; --dry-run says how much a run takes"),
    ],
)
def test_what_the_system_refuses_is_one_sentence(cli, monkeypatch, tmp_path, error, words):
    def refuse(*_):
        raise error

    monkeypatch.setattr("quantize.artifact.verify.verify_artifact", refuse)
    (tmp_path / "manifest.json").write_text("{}")
    shown = cli("verify", tmp_path)
    assert (shown.code, shown.err.count("\n")) == (1, 1)
    assert shown.err.startswith(words)
