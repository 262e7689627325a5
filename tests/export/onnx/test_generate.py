"""`quantize-model run`: a real model continues a text, and what cannot be run says why."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import onnx
import pytest
import torch
from helpers.json_files import change_json
from onnx import helper

from benchmarks.families.families import FAMILIES
from quantize import load
from quantize.checkpoint.tokenizer import load_tokenizer
from quantize.export.directory import export_artifact
from quantize.export.onnx.decoder import Decoder
from quantize.export.onnx.genai import genai_config
from quantize.export.onnx.runtime import session
from quantize.export.onnx.runtime.decoder_session import OnnxDecoder
from quantize.export.onnx.runtime.generate import PARTIAL, stream
from quantize.export.onnx.runtime.saturation import has_exact_int8_gemm

PROMPT = "Once upon a time"


@pytest.fixture(scope="module")
def exported(artifact_rtn, tmp_path_factory):
    """One layer of stories260K at W4A16, where both engines choose the same tokens."""
    output = tmp_path_factory.mktemp("run") / "onnx"
    export_artifact(artifact_rtn.directory, "onnx", output)
    return output


def test_it_continues_a_text_as_torch_does(cli, exported, artifact_rtn):
    tokenizer = load_tokenizer(artifact_rtn.directory)
    given = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        made = load(artifact_rtn.directory).generate(given, max_new_tokens=12, do_sample=False)[0]
    whole, before = tokenizer.decode(made), tokenizer.decode(given[0])
    shown = cli("run", exported, "--prompt", PROMPT, "--max-new-tokens", 12)
    assert shown.code == 0, shown.err
    assert len(made) == given.shape[1] + 12
    assert shown.out == whole.removeprefix(before) + "\n"


@pytest.mark.parametrize(("family", "length"), [("bloom", 8192), ("mpt", 256), ("idefics3", 256)])
def test_genai_files_of_models_that_name_their_sizes_otherwise(family, length):
    """Without positions, with another name for them, and with the sizes in the config of a part."""
    found = genai_config(Decoder(FAMILIES[family].build()), {})["model"]
    assert (found["context_length"], found["vocab_size"], found["decoder"]["hidden_size"]) == (length, 384, 64)


def test_what_onnxruntime_genai_needs_lies_beside(exported, artifact_rtn):
    """And where it is installed, it makes the same tokens."""
    settings = json.loads((exported / "genai_config.json").read_text())
    decoder = settings["model"]["decoder"]
    file = onnx.load(exported / decoder["filename"]).graph
    expected = {name.replace("%d", "0") for name in [*decoder["inputs"].values(), *decoder["outputs"].values()]}
    assert expected == {value.name for value in [*file.input, *file.output]}
    assert (settings["model"]["type"], decoder["num_hidden_layers"], decoder["head_size"]) == ("llama", 1, 8)
    assert decoder["num_key_value_heads"] == 4
    genai = pytest.importorskip("onnxruntime_genai")
    given = load_tokenizer(exported)(PROMPT)["input_ids"]
    model = genai.Model(str(exported))
    generator = genai.Generator(model, genai.GeneratorParams(model))
    generator.append_tokens(given)
    for _ in range(12):
        generator.generate_next_token()
    with torch.no_grad():
        made = load(artifact_rtn.directory).generate(torch.tensor([given]), max_new_tokens=12, do_sample=False)[0]
    assert generator.get_sequence(0).tolist() == made.tolist()


@pytest.mark.parametrize("vnni", [True, False])
def test_cpus_without_vnni_are_told_to_be_exact(exported, monkeypatch, vnni):
    monkeypatch.setattr(session, "has_exact_int8_gemm", lambda: vnni)
    options = session.session_of(exported).get_session_options()
    assert options.get_session_config_entry("session.x64quantprecision") == ("0" if vnni else "1")


def test_whether_a_cpu_is_exact_is_measured():
    """As one that says of itself which instructions it has."""
    info = Path("/proc/cpuinfo")
    if not info.exists() or "flags" not in info.read_text():
        pytest.skip("x86 on Linux alone says so")
    assert has_exact_int8_gemm() == ("vnni" in info.read_text())


def test_it_stops_where_the_text_or_the_positions_end(cli, exported, tmp_path):
    shutil.copytree(exported, tmp_path / "onnx")
    tokenizer = load_tokenizer(exported)
    first = cli("run", exported, "--prompt", PROMPT, "--max-new-tokens", 3).out
    positions = len(tokenizer(PROMPT)["input_ids"]) + 3
    change_json(tmp_path / "onnx" / "config.json", max_position_embeddings=positions)
    assert cli("run", tmp_path / "onnx", "--prompt", PROMPT, "--max-new-tokens", 99).out == first
    ends = list(range(json.loads((exported / "config.json").read_text())["vocab_size"]))
    change_json(tmp_path / "onnx" / "config.json", eos_token_id=ends)
    assert cli("run", tmp_path / "onnx", "--prompt", PROMPT).out == "\n"
    shown = cli("run", tmp_path / "onnx", "--prompt", PROMPT * 9)
    assert shown.code == 2
    assert f"tokens; the model takes 1 to {positions - 1}" in shown.err


def test_characters_come_whole(exported, monkeypatch):
    """The bytes of ü are two tokens."""
    tokenizer = load_tokenizer(exported)
    tokens = tokenizer("aüb")["input_ids"][-4:]
    assert any(tokenizer.decode(tokens[:n]).endswith(PARTIAL) for n in range(4))
    monkeypatch.setattr(OnnxDecoder, "greedy", lambda self, ids, limit: iter(tokens))
    pieces = list(stream(exported, PROMPT, 4))
    assert "".join(pieces).endswith("aüb")
    assert not any(PARTIAL in piece for piece in pieces)


@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        (lambda d: shutil.rmtree(d), 2, "no such exported model: "),
        (lambda d: (d / "model.onnx").unlink(), 2, "holds no .onnx file; write one with `quantize-model export --"),
        (lambda d: (d / "tokenizer.json").unlink(), 2, "has no tokenizer; export an artifact whose model directory"),
        (lambda d: (d / "model.onnx").write_bytes(b"no model"), 1, "ONNX Runtime cannot load"),
        (lambda d: (d / "ort_config.json").write_text("{"), 1, "ort_config.json is no JSON"),
    ],
)
def test_what_cannot_be_run_is_refused(cli, exported, tmp_path, change, code, message):
    shutil.copytree(exported, tmp_path / "onnx")
    change(tmp_path / "onnx")
    shown = cli("run", tmp_path / "onnx", "--prompt", "a")
    assert (shown.code, shown.out) == (code, "")
    assert shown.err.startswith("error: ")
    assert shown.err.count("\n") == 1
    assert message in shown.err


def test_a_file_without_a_cache_is_refused(cli, tmp_path):
    image, same = (helper.make_tensor_value_info(name, 1, ["batch_size", 3]) for name in ("pixel_values", "logits"))
    graph = helper.make_graph([helper.make_node("Identity", ["pixel_values"], ["logits"])], "same", [image], [same])
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10), tmp_path / "model.onnx"
    )
    shown = cli("run", tmp_path, "--prompt", "a")
    assert shown.code == 2
    assert "takes pixel_values and no cache; only causal language models continue a text" in shown.err
