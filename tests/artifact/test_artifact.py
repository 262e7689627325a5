"""What a finished run leaves, and what an unfinished one does not."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pkgutil
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from helpers.json_files import sign_again
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

from quantize import load
from quantize.artifact.verify import verify_artifact
from quantize.artifact.writer import ArtifactWriter
from quantize.checkpoint.opening import open_checkpoint
from quantize.errors import QuantizeError, UsageError
from quantize.nn.quantized_linear import QuantizedLinear

PROMPT = torch.tensor([[1, 403, 407, 261]])


@pytest.fixture
def damaged(artifact_rtn, tmp_path):
    """A copy of an artifact to damage."""
    return Path(shutil.copytree(artifact_rtn, tmp_path / "damaged"))


def tensors(directory):
    return {k: v for path in directory.glob("model-*.safetensors") for k, v in load_file(path).items()}


def read(path):
    return json.loads(path.read_text())


def test_everything_promised_is_there_and_nothing_executable(artifact_w4a4, stories, stories_calibration, tree):
    directory, manifest = artifact_w4a4.directory, artifact_w4a4.manifest
    files = tree(directory)
    assert {Path(name).suffix for name in files} == {".safetensors", ".json", ".toml", ".html", ".md"}
    assert b"<script" not in files["report.html"]
    assert manifest == read(directory / "manifest.json")
    hashes = {name: hashlib.sha256(data).hexdigest() for name, data in files.items() if name != "manifest.json"}
    assert manifest["files"] == hashes
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert files[name] == (stories / name).read_bytes()
    assert (manifest["scheme"], manifest["seed"]) == ("W4A4", 0)
    assert manifest["versions"].items() >= {(name, version(name)) for name in ("torch", "transformers", "numpy")}
    data = hashlib.sha256(stories_calibration.read_bytes()).hexdigest()
    assert manifest["calibration"] == {"sha256": data, "rows": 7, "tokens": 7 * 64, "leading_tokens": [1]}
    assert manifest["gate"]["passes"].keys() == {"rescale", "fold_norms", "learned_rotation"}
    differences = [d for blocks in manifest["gate"]["passes"].values() for d in blocks.values()]
    assert 0 < max(differences) <= manifest["gate"]["tolerance"]
    assert manifest["parity"]["reloaded"] <= 1e-5
    assert 0 < manifest["parity"]["fake_quant"] < 1e-3


def test_every_parameter_is_listed_as_quantized_or_with_a_reason(artifact_w4a4, float_stories):
    coverage = artifact_w4a4.manifest["coverage"]
    assert coverage.keys() == {name for name, _ in float_stories.named_parameters(remove_duplicate=False)}
    linears = [name for name in coverage if name.endswith("_proj.weight")]
    done = {name for name, how in coverage.items() if how == "quantized"}
    assert done == {*linears, "lm_head.weight", "model.embed_tokens.weight"}
    assert len(linears) == 35
    reasons = {name: why for name, why in coverage.items() if why != "quantized"}
    assert set(reasons.values()) == {"no weight of a linear"}


def test_integers_are_packed_and_the_config_says_how(artifact_w4a4, float_stories):
    stored, config = tensors(artifact_w4a4.directory), read(artifact_w4a4.directory / "config.json")
    settings = config["quantization_config"]
    assert settings["quant_method"] == "quantize-model"
    for path, entry in settings["modules"].items():
        rows, columns = float_stories.get_submodule(path).weight.shape
        assert entry["columns"] == columns
        if path == "lm_head":
            continue
        assert stored[f"{path}.qweight"].nbytes == rows * -(-columns // 2)
        assert stored[f"{path}.zero_point"].nbytes == rows
        assert stored[f"{path}.scale"].shape == (rows, 1)
        assert f"{path}.weight" not in stored
    for path in ("lm_head", *settings["tables"]):
        assert (stored[f"{path}.qweight"].dtype, stored[f"{path}.scale"].shape) == (torch.int8, (512, 1))
        assert f"{path}.weight" not in stored and f"{path}.zero_point" not in stored
    assert settings["tables"] == ["model.embed_tokens"]
    index = read(artifact_w4a4.directory / "model.safetensors.index.json")["weight_map"]
    for name, file in index.items():
        with safe_open(artifact_w4a4.directory / file, framework="pt") as opened:
            assert name in opened.keys()  # noqa: SIM118  it is no dict
    assert index.keys() == stored.keys()


def test_it_loads_and_generates(artifact_w4a4, float_stories):
    model = load(artifact_w4a4.directory)
    assert type(model) is type(float_stories)
    assert not model.training
    assert sum(isinstance(layer, QuantizedLinear) for layer in model.modules()) == 36
    found, expected = (m.generate(PROMPT, max_new_tokens=8, do_sample=False) for m in (model, float_stories))
    assert found.shape == expected.shape == (1, 12)
    with torch.no_grad():
        agree = model(expected).logits.argmax(-1) == float_stories(expected).logits.argmax(-1)
        torch.testing.assert_close(artifact_w4a4.load()(expected).logits, model(expected).logits, rtol=0, atol=0)
    assert agree.float().mean() > 0.5
    half = load(artifact_w4a4.directory, dtype=torch.bfloat16)
    assert half.generate(PROMPT, max_new_tokens=2).shape == (1, 6)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


def test_rounding_keeps_tied_weights_tied_and_stored_once(artifact_rtn, one_layer):
    assert not artifact_rtn.manifest["untied"]
    assert read(artifact_rtn.directory / "config.json")["tie_word_embeddings"]
    assert len({"lm_head.weight", "model.embed_tokens.weight"} & tensors(artifact_rtn.directory).keys()) == 1
    model = load(artifact_rtn.directory)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    expected = open_checkpoint(one_layer).load().lm_head.weight
    torch.testing.assert_close(model.lm_head.weight, expected, rtol=0, atol=0)


def test_rotation_unties_weights_and_says_so(artifact_w4a4):
    assert artifact_w4a4.manifest["untied"]
    assert not read(artifact_w4a4.directory / "config.json")["tie_word_embeddings"]
    stored = tensors(artifact_w4a4.directory)
    head, table = (stored[f"{path}.qweight"] * stored[f"{path}.scale"] for path in ("lm_head", "model.embed_tokens"))
    assert float((head - table).abs().max()) > 0.1


@pytest.mark.slow
def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(artifact_one_layer, variant, small_run, tree):
    moved = variant()
    folded = {"recipe": "w4a4-folded"}
    first, again = tree(artifact_one_layer), tree(small_run(moved, output="again", seed=0, **folded))
    other = tree(small_run(moved, output="other", seed=1, **folded))
    assert first == again
    assert [name for name in first if name.startswith("model-") and first[name] != other[name]]


def test_side_files_come_along_but_no_code_and_no_pickle(variant, small_run, tree):
    model = variant()
    wanted, unwanted = ["chat_template.jinja", "onnx/vocab.txt"], ["evil.py", "pytorch_model.bin", ".cache/a.json"]
    for name in wanted + unwanted:
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_text(name)
    files = tree(small_run(model, "W8A8", recipe={"quantizer": {"name": "rtn"}}))
    assert all(files[name] == name.encode() for name in wanted)
    assert not files.keys() & set(unwanted)


def test_verify_passes_an_artifact_and_returns_what_it_found(artifact_w4a4):
    found = verify_artifact(artifact_w4a4.directory)
    assert found["files"] == len(artifact_w4a4.manifest["files"])
    assert found["difference"] < 1e-5


def test_verify_notices_one_flipped_bit_in_any_file(artifact_rtn, damaged):
    for name in artifact_rtn.manifest["files"]:
        path = damaged / name
        data = path.read_bytes()
        path.write_bytes(data[:-2] + bytes([data[-2] ^ 1]) + data[-1:])
        with pytest.raises(QuantizeError, match=f"{name} has changed since it was written"):
            verify_artifact(damaged)
        path.write_bytes(data)
    assert verify_artifact(damaged)["difference"] < 1e-5


def test_verify_notices_a_file_too_many_and_one_too_few(damaged):
    (damaged / "extra.py").touch()
    with pytest.raises(QuantizeError, match=r"extra\.py is not in the manifest"):
        verify_artifact(damaged)
    (damaged / "extra.py").unlink()
    (damaged / "tokenizer.json").unlink()
    with pytest.raises(QuantizeError, match=r"tokenizer\.json is missing"):
        verify_artifact(damaged)


def test_the_digest_stands_for_the_manifest_and_for_all_files(artifact_rtn, damaged):
    manifest, path = artifact_rtn.manifest, damaged / "manifest.json"
    content = json.dumps({k: v for k, v in manifest.items() if k != "digest"}, sort_keys=True, separators=(",", ":"))
    digest = hashlib.sha256(content.encode()).hexdigest()
    assert manifest["digest"] == verify_artifact(damaged)["digest"] == digest
    assert verify_artifact(damaged, digest)["digest"] == digest
    path.write_text(json.dumps(manifest, sort_keys=True))  # other white space, another order: the same content
    assert verify_artifact(damaged, digest)["digest"] == digest
    for change in ({"seed": 7}, {"digest": "0" * 64}, {"note": "x"}, {"coverage": {}}):
        path.write_text(json.dumps(manifest | change))
        with pytest.raises(QuantizeError, match=r"manifest.json has changed since it was written: its digest is"):
            verify_artifact(damaged)
    del manifest["digest"]
    path.write_text(json.dumps(manifest))
    with pytest.raises(QuantizeError, match=r"manifest.json has changed since it was written"):
        verify_artifact(damaged)
    sign_again(damaged, seed=7)  # whoever makes an artifact can sign it
    verify_artifact(damaged)
    with pytest.raises(QuantizeError, match=rf"the digest of {damaged} is [0-9a-f]+ and not '{digest}'; fetch"):
        verify_artifact(damaged, digest)


def test_verify_names_what_is_not_in_the_manifest(damaged):
    for name, make in {
        "extra.txt": lambda path: path.write_text("x"),
        "sub/evil.py": lambda path: (path.parent.mkdir(), path.write_text("x")),
        "link": lambda path: path.symlink_to("/nowhere"),
        "pipe": os.mkfifo,
    }.items():
        make(damaged / name)
        with pytest.raises(QuantizeError, match=f"{name} is not in the manifest"):
            verify_artifact(damaged)
        (damaged / name).unlink()
    (damaged / "recipe.toml").unlink()
    os.mkfifo(damaged / "recipe.toml")
    with pytest.raises(QuantizeError, match=r"recipe.toml is no regular file"):
        verify_artifact(damaged)


def test_verify_runs_the_model_even_if_all_hashes_fit(damaged):
    path = next(path for path in damaged.glob("model-*") if "model.norm.weight" in load_file(path))
    save_file({k: t * 1.1 for k, t in load_file(path).items()}, path, {"format": "pt"})
    sign_again(damaged)
    with pytest.raises(QuantizeError, match="its output differs from the recorded one by"):
        verify_artifact(damaged)


@pytest.mark.parametrize("content", [None, "", "{", "[]", "{}", '{"files": {}}', b"\xff"])
def test_a_directory_without_a_proper_manifest_is_no_artifact(damaged, content):
    path = damaged / "manifest.json"
    path.unlink() if content is None else path.write_bytes(content.encode() if isinstance(content, str) else content)
    for use in (verify_artifact, load):
        with pytest.raises(UsageError, match="is no artifact of quantize-model"):
            use(damaged)


def test_a_damaged_artifact_does_not_load(damaged):
    with pytest.raises(UsageError, match="no such artifact"):
        load(damaged / "absent")
    path = next(path for path in damaged.glob("model-*") if "model.layers.0.mlp.up_proj.qweight" in load_file(path))
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(QuantizeError, match=f"{path.name} is truncated or no safetensors file"):
        load(damaged)
    path.unlink()
    with pytest.raises(QuantizeError, match=f"holds no '{path.name}', which model.safetensors.index.json names"):
        load(damaged)
    (damaged / "model.safetensors.index.json").unlink()
    with pytest.raises(QuantizeError, match="holds no integers for it"):
        load(damaged)


def test_all_is_on_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    flushed, output = {}, tmp_path / "out"
    monkeypatch.setattr(os, "fsync", lambda file: flushed.setdefault(os.fstat(file).st_ino, output.exists()))
    with ArtifactWriter(output) as writer:
        writer.add("a.safetensors", {"x": torch.ones(3)})
        writer.write("deep/b.json", "{}")
        writer.commit({})
    written = [output, *output.rglob("*")]
    assert {path.name for path in written} == {"out", "a.safetensors", "deep", "b.json", "manifest.json"}
    assert not any(flushed[path.stat().st_ino] for path in written)
    assert flushed[tmp_path.stat().st_ino]  # the name itself, afterwards


class Run:
    """The command in a process of its own, stopped once it quantizes the second block and has noted the first."""

    def __init__(self, number, model, data, directory):
        script = Path(sys.executable).with_name("quantize-model")
        options = ["--scheme", "W4A4", "--group-size", "0", "--nsamples", "32", "--seqlen", "256"]
        directory.mkdir()
        self.number, self.directory = number, directory
        self.command = [script, model, *options, "--calibration", data, "--output-dir", "out"]
        self.process = subprocess.Popen(self.command, cwd=directory, stderr=subprocess.PIPE, text=True)

    def stop(self):
        with self.process as process:
            seen = ""
            while "quantizing 2/" not in seen and (line := process.stderr.readline()):
                seen += line
            border, last = self.directory / ".out.partial/journal/border-00001", time.monotonic() + 60
            while not border.exists() and process.poll() is None and time.monotonic() < last:
                time.sleep(0.001)
            self.inside = sorted(path.name for path in self.directory.glob(".out.*/artifact/*"))
            process.send_signal(self.number)
            self.text = seen + process.stderr.read()
        self.code = process.returncode


@pytest.fixture(scope="module")
def stopped(one_layer, stories_calibration, tmp_path_factory):
    """One run for each signal, all at the same time."""
    directory = tmp_path_factory.mktemp("stopped")
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)
    runs = {number: Run(number, one_layer, stories_calibration, directory / number.name) for number in numbers}
    with ThreadPoolExecutor() as pool:
        list(pool.map(Run.stop, runs.values()))
    return runs


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_keeps_what_is_finished(stopped, number):
    run = stopped[number]
    assert run.inside, run.text  # it was in the middle of writing
    assert run.code == 1
    assert re.search(r"interrupted; .*\.out\.partial keeps what is finished; give .* --resume", run.text)
    assert "Traceback" not in run.text
    assert [path.name for path in run.directory.iterdir()] == [".out.partial"]


@pytest.mark.slow
def test_a_killed_run_leaves_nothing_under_the_final_name_and_goes_on_with_resume(stopped, small_run, one_layer, tree):
    run = stopped[signal.SIGKILL]
    assert run.inside, run.text
    assert run.code == -signal.SIGKILL
    assert not (run.directory / "out").exists()
    resumed = subprocess.run([*run.command, "--resume"], cwd=run.directory, capture_output=True, text=True)
    assert "going on behind block 1 of 3" in resumed.stderr
    assert [path.name for path in run.directory.iterdir()] == ["out"]
    assert tree(run.directory / "out") == tree(small_run(one_layer, nsamples=32, seqlen=256))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_that_a_library_swallows_still_stops_the_run(
    cli_apart, one_layer, stories_calibration, tmp_path, monkeypatch, number
):
    """Torch runs callbacks in which an exception is only printed, and turns others into errors of its own."""
    export = torch.export.export

    def swallows(*arguments, **options):
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(number)
        time.sleep(5)  # a fast machine would end the run before it is interrupted anew
        return export(*arguments, **options)

    monkeypatch.setattr("quantize.graph.export.torch.export.export", swallows)
    data = ["--calibration", stories_calibration, "--nsamples", 2, "--seqlen", 16]
    shown = cli_apart(one_layer, "--scheme", "W8A8", *data, "--output-dir", tmp_path / "out")
    assert shown.code == 1
    assert "interrupted; nothing was kept" in shown.err
    assert not list(tmp_path.iterdir())


def test_an_interruption_waits_until_the_code_of_torch_that_called_back_has_returned(
    cli_apart, one_layer, stories_calibration, tmp_path, monkeypatch
):
    """An exception in a callback of its C++ may abort the process."""

    class Interrupted(TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            del types
            signal.raise_signal(signal.SIGINT)
            print("reached", operator)
            return operator(*args, **(kwargs or {}))

    def export(*_, **__):
        with Interrupted():
            torch.ones(1)
        time.sleep(60)

    monkeypatch.setattr("quantize.graph.export.torch.export.export", export)
    data = ["--calibration", stories_calibration, "--nsamples", 2, "--seqlen", 16]
    shown = cli_apart(one_layer, "--scheme", "W8A8", *data, "--output-dir", tmp_path / "out")
    assert shown.out.count("reached") == 1
    assert "interrupted; nothing was kept" in shown.err


def test_a_second_interruption_does_not_stop_the_cleaning(
    cli_apart, one_layer, stories_calibration, tmp_path, monkeypatch
):
    remove = shutil.rmtree

    def impatient(*_, **__):
        monkeypatch.setattr("quantize.artifact.writer.shutil.rmtree", remove)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("quantize.artifact.writer.shutil.rmtree", impatient)
    monkeypatch.setattr("quantize.artifact.writer.save_file", lambda *_: signal.raise_signal(signal.SIGINT))
    data = ["--calibration", stories_calibration, "--nsamples", 2, "--seqlen", 16]
    shown = cli_apart(one_layer, "--scheme", "W8A8", *data, "--output-dir", tmp_path / "out")
    assert shown.code == 1
    assert "interrupted; nothing was kept" in shown.err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["tempfile.mkdtemp", "remove"])
def test_an_interruption_while_the_directory_is_made_or_removed_leaves_nothing(
    cli_apart, artifact_rtn, tmp_path, monkeypatch, name
):
    place, _, attribute = f"quantize.artifact.writer.{name}".rpartition(".")
    original = getattr(pkgutil.resolve_name(place), attribute)

    def interrupted(*arguments, **options):
        if name == "remove":
            signal.raise_signal(signal.SIGINT)
            return original(*arguments, **options)
        made = original(*arguments, **options)
        signal.raise_signal(signal.SIGINT)
        return made

    monkeypatch.setattr(f"{place}.{attribute}", interrupted)
    monkeypatch.setattr("quantize.export.directory.export_artifact", abandoned)
    shown = cli_apart("export", artifact_rtn.directory, "--format", "safetensors-float", "-o", tmp_path / "out")
    assert (shown.code, shown.err.strip()) == (1, "interrupted; nothing was kept")
    assert not list(tmp_path.iterdir())


def abandoned(_directory, _target, output, *_, **__):
    """Begin to write an export, and give up."""
    with ArtifactWriter(output):
        raise QuantizeError("given up")


def test_an_interruption_behind_the_renaming_says_that_the_output_is_complete(
    cli_apart, artifact_rtn, tmp_path, monkeypatch
):
    publish = ArtifactWriter.publish

    def interrupted(writer):
        publish(writer)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(ArtifactWriter, "publish", interrupted)
    shown = cli_apart("export", artifact_rtn.directory, "--format", "safetensors-float", "-o", tmp_path / "out")
    assert (shown.code, shown.err.strip().splitlines()[-1]) == (1, f"interrupted; {tmp_path / 'out'} is complete")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
