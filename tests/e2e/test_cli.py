"""The commands: what they print, and with which code they end."""

from __future__ import annotations

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

import quantize
from quantize.checkpoint.tokenizer import load_tokenize
from quantize.eval.report import load_any
from quantize.recipe.recipe import load_recipe
from quantize.scheme.scheme import SCHEME_NAMES


def words(text):
    return " ".join(text.split())


@pytest.mark.parametrize("command", [[], ["quantize"], ["inspect"], ["eval"], ["export"], ["run"], ["verify"]])
def test_help_ends_with_0_and_imports_nothing_slow(cli, command):
    shown = cli(*command, "--help")
    assert shown.code == 0
    assert "quantize-model" in shown.out.splitlines()[0]
    source = "import sys, quantize.cli; sys.exit('torch' in sys.modules)"
    if not command:
        assert subprocess.run([sys.executable, "-c", source], check=False).returncode == 0


def test_help_states_the_true_defaults(cli):
    shown, recipe = words(cli("quantize", "--help").out), load_recipe("W4A4", None)
    assert f"[default: {recipe.nsamples}]" in shown
    assert f"[default: {recipe.seqlen}]" in shown
    others = {name: load_recipe(name, None).weights.group_size for name in SCHEME_NAMES}
    others = ", ".join(f"{name}: {size}" for name, size in others.items() if size != recipe.weights.group_size)
    assert f"[default: {recipe.weights.group_size}; {others}]" in shown
    assert f"[{'|'.join(SCHEME_NAMES)}]" in shown


def test_wrong_use_is_answered_without_torch(one_layer, tmp_path):
    """In a process of its own, as this one has imported torch."""
    for name in ("model.gguf", "model.safetensors"):
        (tmp_path / name).write_bytes(b"GGUF")
    exported, text, misplaced = tmp_path / "exported", tmp_path / "some.txt", tmp_path / "misplaced.toml"
    exported.mkdir()
    (exported / "manifest.json").write_text('{"format": "onnx", "artifact": {}}')
    text.write_text("some words")
    misplaced.write_text('scheme = "W8A8"\ngroup_size = 64\n')

    def method(line):
        path = tmp_path / f"{sum(map(ord, line))}.toml"
        path.write_text(f'scheme = "W4A8"\n{line}\n')
        return path

    calls = [
        (["no/such/model"], "no such model directory: no/such/model"),
        ([tmp_path / "model.gguf"], "is a GGUF file, and no config.json lies beside it; put the float model's there"),
        ([tmp_path / "model.safetensors"], "is one file of a model, and no config.json lies beside it"),
        ([tmp_path], "holds no config.json, so it is no model directory"),
        ([one_layer], "give --scheme, one of W8A8, "),
        ([one_layer, "--scheme", "w8a8"], "give --output-dir"),
        ([one_layer, "-o", tmp_path], f"{tmp_path} exists already; give a new --output-dir"),
        (
            [one_layer, "-o", "new", "--calibration", tmp_path],
            "holds no .arrow and no .parquet files; give a directory of `datasets`, or one file",
        ),
        (
            [one_layer, "-o", exported, "--scheme", "w8a8", "--resume"],
            "exported is finished, so there is nothing to go",
        ),
        ([one_layer, "-o", "new", "--scheme", "w8a8", "--force"], "--force is for --resume; leave it out, or"),
        ([one_layer, "-o", "new", "--recipe", text], "some.txt is no TOML: "),
        (
            [one_layer, "-o", "new", "--recipe", misplaced],
            "group_size: there is no such key here; did you mean `[weights]",
        ),
        ([one_layer, "-o", "new", "--recipe", "w4a5"], "no such recipe: w4a5; give a .toml or .yaml file, or one of"),
        ([one_layer, "-o", "new", "--scheme", "w6a6", "--target", "vllm"], "vllm cannot execute W6A6: it has no"),
        ([one_layer, "-o", "new", "--scheme", "w8a8", "--adapter", "nowhere"], "no such adapter: nowhere"),
        ([one_layer, "-o", "new", "--scheme", "w8a8", "--stats", "nowhere"], "no such file: nowhere"),
        *(
            ([one_layer, "-o", "new", "--recipe", recipe], words)
            for recipe, words in {
                method(
                    "passes = [{ name = 'rotat' }]"
                ): "there is no pass 'rotat'; known are activation_clip, adaptive",
                method("quantizer = { name = 'awq' }"): "there is no quantizer 'awq'; known are gptaq, gptq, rtn",
                method(
                    "weights = { format = 'nf5' }"
                ): "there is no number format 'nf5'; known are dint4, dint4_full, int, iq4_nl",
                method(
                    "layers = [{ match = 'q_prj', ignore = true }]"
                ): "layers: 'q_prj' matches no linear; near are q_",
                method("tables = ['lm_hed']"): "tables: 'lm_hed' matches no table of words or linear that scores the",
                method("seqlen = 513"): "--seqlen 513 is more than the 512 positions of the model",
            }.items()
        ),
        (
            [one_layer, "-o", "new", "--scheme", "w8a8", "--seqlen", "513"],
            "--seqlen 513 is more than the 512 positions",
        ),
        (
            [one_layer, "-o", "new", "--scheme", "w8a8", "--ignore", "lm_head,q_proj,*.mlp.down_prj"],
            "ignore: '*.mlp.down_prj' matches no linear; near are down_proj",
        ),
        (
            [one_layer, "-o", "new", "--scheme", "w8a8", "--ignore", "re:*"],
            "ignore: 're:*' is no regular expression of",
        ),
        (
            [one_layer, "-o", "new", "--scheme", "w8a8", "--low-disk"],
            "--low-disk is for a model on the hub, and this one",
        ),
        (["prune", one_layer, "-o", "new", "--ratio", "0.5", "--seqlen", "513"], "--seqlen 513 is more than the 512"),
        (["merge-stats", "nowhere", "--output", "new"], "no such file: nowhere"),
        (["inspect", one_layer, "--calibration", text], "--calibration is text for --activations; give both or"),
        (["eval", one_layer, "--text", text, "--kurtosis"], "--kurtosis compares with the float model; give --against"),
        (["eval", one_layer, "--text", text, "--drift"], "--drift compares with the float model; give --against"),
        (["eval", one_layer, "--drift", "--kurtosis"], "--drift goes with neither --tasks nor --kurtosis nor"),
        (
            ["eval", one_layer, "--text", text, "--bit-flips", "0.5"],
            "--bit-flips takes numbers from 0 to 0.01 separated",
        ),
        (["eval", one_layer, "--text", text, "--bit-flips", "few"], "separated by commas, and 'few' is no such list"),
        (["eval", one_layer, "--bit-flips", "1e-6"], "--bit-flips goes with --text FILE, and not with another"),
        (["verify", "nowhere"], "no such artifact: nowhere"),
        (["verify", one_layer], "holds no manifest.json of a model, so it is no artifact of quantize-model; quantize"),
        (["report", exported], "is an export for 'onnx'; give the artifact that it was made of"),
        (["eval", exported, "--text", text], "is an export for 'onnx'; give the artifact that it was made of"),
        (["eval", one_layer, "--text", text, "--against", "no/such/model"], "no such model directory: no/such/model"),
        (["export", exported, "-o", "new"], "is an export for 'onnx'; give the artifact that it was made of"),
        (["mistyped"], "mistyped is no directory here, and the hub cannot be reached to fetch it; give a model's"),
        (["inspect", "owner/mistyped"], "owner/mistyped is no directory here, and the hub cannot be reached"),
        (["eval", one_layer, "--text", "nowhere.txt"], "no such file: nowhere.txt"),
        (["eval", "nowhere", "--text", text], "no such artifact or model: nowhere"),
        (["eval", tmp_path / "model.gguf", "--text", text], "is a GGUF file, and no config.json lies beside it"),
        (["eval", one_layer, "--tasks", "nowhere.yaml"], "no such file: nowhere.yaml"),
        (["export", "nowhere", "-o", "new"], "no such artifact: nowhere"),
        (["run", exported, "--prompt", "a"], "exported holds no .onnx file; write one with `quantize-model export"),
    ]
    source = """
import io, json, sys, contextlib
from quantize.cli import main
for arguments in json.loads(sys.argv[1]):
    sys.argv = ["quantize-model", *arguments]
    with contextlib.suppress(SystemExit), contextlib.redirect_stderr(io.StringIO()) as told:
        main()
    print(told.getvalue().strip())
sys.exit("torch" in sys.modules)
"""
    given = json.dumps([[str(part) for part in arguments] for arguments, _ in calls])
    offline = os.environ | {"HF_HUB_OFFLINE": "1"}
    run = subprocess.run([sys.executable, "-c", source, given], capture_output=True, text=True, env=offline)
    assert run.returncode == 0, run.stderr
    for line, (_, expected) in zip(run.stdout.splitlines(), calls, strict=True):
        assert line.startswith("error: ")
        assert expected in line


def test_recipes_schemes_and_completion_are_listed(cli):
    listed = cli("recipes").out.splitlines()
    assert {line.split()[0] for line in listed} >= {"w4a4", "w4a4-vllm", "w8a8"}
    assert all(len(line.split()) > 3 for line in listed)
    table = {line.split()[0]: line for line in cli("schemes").out.splitlines()[1:]}
    assert table.keys() == set(SCHEME_NAMES)
    assert re.search(r"int4 +float +128 +.*onnxruntime, transformers, vllm; also called int4", table["W4A16"])
    assert "vllm" not in table["W6A6"]
    assert "_QUANTIZE_MODEL_COMPLETE=bash_complete" in cli("completion", "bash").out


def test_the_public_names():
    assert set(dir(quantize)) >= {"Recipe", "evaluate", "export_artifact", "inspect", "load", "quantize_model"}
    assert all(getattr(quantize, name) for name in dir(quantize))
    assert quantize.__version__ == "0.1.0"
    assert (Path(quantize.__file__).parent / "py.typed").is_file()


def test_version(cli):
    shown = cli("--version")
    assert shown.code == 0
    assert "0.1.0" in shown.out


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["eval", "x"],
        ["export", "x"],
        ["run"],
        ["run", "x", "--prompt", "a", "--max-new-tokens", "0"],
        ["verify"],
        ["inspect"],
        ["model", "--no-such-option"],
        ["model", "--scheme", "W3A3", "--output-dir", "out"],
        ["model", "--scheme", "W8A8", "--output-dir", "out", "--nsamples", "many"],
        ["model", "--scheme", "W8A8", "--output-dir", "out", "--seqlen", "1"],
        ["export", "x", "--format", "mlx", "--output-dir", "out"],
        ["eval", "x", "--text", "t.jsonl", "--nsamples", "0"],
        ["eval", "x", "--text", "t.jsonl", "--nsamples", "-1"],
        ["eval", "x", "--text", "t.jsonl", "--seqlen", "1"],
    ],
)
def test_wrong_use_ends_with_2_and_a_hint(cli, arguments, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    shown = cli(*arguments)
    assert shown.code == 2
    assert "Usage: " in shown.err
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_console_script_writes_the_same_bytes_as_the_function(
    artifact_one_layer, one_layer, stories_calibration, tmp_path, tree
):
    """In another process the hashes of strings are others, so an order that depends on them shows."""
    script = Path(sys.executable).with_name("quantize-model")
    options = ["--recipe", "w4a4-folded", "--group-size", "0", "--nsamples", "2", "--seqlen", "16", "--seed", "0"]
    arguments = [one_layer, *options, "--calibration", stories_calibration, "--output-dir", "out"]
    run = subprocess.run(
        [script, *arguments], cwd=tmp_path, env=os.environ | {"PYTHONHASHSEED": "7"}, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    first, judged, digest, following = run.stdout.splitlines()
    assert first.startswith("out: W4A4 in 7 linears, W8A16 in 1, 99.6% of the body's parameters quantized, ")
    assert f" bytes where the float model has {(one_layer / 'model.safetensors').stat().st_size:,}, " in first
    assert re.search(r"loss [\d.]+ in floating point, [\d.]+ by plain rounding, [\d.]+ as quantized", judged)
    assert digest.startswith("digest ")
    assert following == f"next: quantize-model eval out --against {one_layer} --text FILE"
    assert "Warning" not in run.stderr
    assert [line for line in run.stderr.splitlines() if "layers.0" in line]
    assert tree(tmp_path / "out") == tree(artifact_one_layer)


def test_options_reach_the_recipe(cli, one_layer, stories_calibration, tmp_path):
    options = ["--group-size", 16, "--nsamples", 3, "--seqlen", 9, "--seed", 4]
    ignored = ["--ignore", "*.down_*, lm_head", "--ignore", "re:.*[qk]_proj"]
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('passes = []\nquantizer = { name = "rtn", mse = true }\n[weights]\nsymmetric = true\n')
    output = tmp_path / "out"
    data = ["--calibration", stories_calibration, "--recipe", recipe, "--output-dir", output]
    shown = cli(one_layer, "--scheme", "w4a8", *options, *ignored, *data, "--quiet")
    assert not shown.err
    assert shown.code == 0
    written = load_recipe(None, output / "recipe.toml")
    assert (written.nsamples, written.seqlen, written.seed, written.scheme) == (3, 9, 4, "W4A8")
    assert (written.weights.group_size, written.weights.symmetric, written.passes) == (16, True, ())
    assert written.quantizer == {"name": "rtn", "mse": True}
    coverage = json.loads((output / "manifest.json").read_text())["coverage"]
    done = [name for name, how in coverage.items() if how == "quantized"]
    assert [name.split(".")[-2] for name in done] == ["gate_proj", "up_proj", "o_proj", "v_proj"]
    assert coverage["model.layers.0.self_attn.q_proj.weight"] == "ignored by 're:.*[qk]_proj'"


def test_progress_for_a_program_is_one_object_a_line(cli, one_layer, stories_calibration, tmp_path):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('passes = []\nquantizer = { name = "rtn" }\n')
    options = ["--group-size", 0, "--nsamples", 3, "--seqlen", 9, "--calibration", stories_calibration]
    shown = cli(
        one_layer, "--scheme", "w4a16", "--recipe", recipe, *options, "-o", tmp_path / "out", "--progress", "json"
    )
    assert (shown.code, shown.err) == (0, "")
    events = [json.loads(line) for line in shown.out.splitlines()]
    assert [x["number"] for x in events if x["event"] == "step" and x["what"] == "quantizing"] == [1, 2, 3]
    done = events[-1]
    assert (done["event"], done["directory"]) == ("done", str(tmp_path / "out"))
    assert done["digest"] == json.loads((tmp_path / "out" / "manifest.json").read_text())["digest"]
    assert done["bytes"] < done["float_bytes"]


@pytest.mark.slow
def test_dry_run_says_what_would_happen_and_writes_nothing(cli, one_layer, stories_calibration, tmp_path, monkeypatch):
    options = ["--group-size", "0", "--nsamples", "2", "--seqlen", "16", "--ignore", "up_proj"]
    monkeypatch.chdir(tmp_path)
    shown = cli(one_layer, "--scheme", "W4A4", *options, "--calibration", stories_calibration, "--dry-run")
    assert shown.code == 0
    assert shown.err == (
        "measuring the time: running model.layers.0 on part of the calibration data, for half a minute at most\n"
    )
    for line in [
        "6 linears to W4A4, in 3 blocks, rounded by gptaq",
        "pass rotate: 1 bases offline, 6 linears online",
        "not quantized: lm_head.weight (ignored by 'lm_head')",
        "not quantized: model.layers.0.mlp.up_proj.weight (ignored by 'up_proj')",
        "75.4% of the body's parameters are quantized",
        "24.2% of the body stays in floating point: model.layers.0.mlp.up_proj.weight (ignored by 'up_proj')",
        "calibration: 2 rows, 32 tokens, each row behind <s>",
        "seqlen = 16",
        "the model can be exported as a graph",
        "export to onnx: yes",
    ]:
        assert line in shown.out.splitlines()
    assert [line.split(":")[0] for line in shown.out.splitlines()[:4]] == ["model", "memory", "disk", "time"]
    assert re.fullmatch(
        r"time: about \d+ (s|minutes); ran model\.layers\.0 on 2 of 2 rows in \d+\.\d s", shown.out.splitlines()[3]
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_inspect_prints_bases_as_data_and_as_a_table(cli, one_layer):
    bases = json.loads(cli("inspect", one_layer, "--json").out)["bases"]
    assert all({"dim", "allowed", "writers", "readers", "pins", "heads"} <= basis.keys() for basis in bases)
    residual = next(basis for basis in bases if "model.embed_tokens.weight" in basis["writers"])
    assert (residual["dim"], residual["allowed"], residual["heads"]) == (64, "orthogonal", 1)
    assert "lm_head.weight" in residual["readers"]
    values = next(basis for basis in bases if basis["writers"] == ["model.layers.0.self_attn.v_proj.weight"])
    assert (values["dim"], values["allowed"], values["heads"]) == (32, "linear", 4)
    table = cli("inspect", one_layer)
    assert table.code == 0
    assert "orthogonal" in table.out


@pytest.mark.slow
def test_eval_prints_one_flat_object(cli, artifact_w4a4, stories, float_stories, stories_dev):
    arguments = ["--text", stories_dev, "--nsamples", 4, "--seqlen", 64]
    shown = cli("eval", artifact_w4a4.directory, "--against", stories, *arguments, "--json")
    scores = json.loads(shown.out)
    assert shown.code == 0
    assert scores.pop("leading_tokens") == "<s>"
    assert all(isinstance(value, int | float) for value in scores.values())
    rows = [json.loads(line)["input_ids"][:64] for line in stories_dev.read_text().splitlines()]
    tokens = torch.tensor(rows[:: len(rows) // 4])
    with torch.no_grad():
        losses = [float(m(tokens, labels=tokens).loss) for m in (load_any(artifact_w4a4), float_stories)]
    assert [scores["loss"], scores["loss_against"]] == pytest.approx(losses, rel=1e-5)
    assert scores["loss_increase"] == pytest.approx(losses[0] - losses[1], abs=1e-4)
    assert scores["perplexity"] == pytest.approx(math.exp(losses[0]), rel=1e-5)
    assert 0 < scores["kl"] < 1
    assert 0.5 < scores["top1"] < 1
    assert scores["tokens"] == 4 * 63
    table = cli("eval", artifact_w4a4.directory, *arguments)
    assert table.code == 0
    assert "perplexity" in table.out


@pytest.fixture
def prose(tmp_path):
    path = tmp_path / "prose.txt"
    path.write_text("Once upon a time there was a little girl who liked to sit by the sea and look at boats. " * 20)
    return path


@torch.no_grad()
def test_eval_reads_windows_behind_the_token_that_begins_texts(cli, one_layer, prose):
    shown = cli("eval", one_layer, "--text", prose, "--seqlen", 32, "--nsamples", 2, "--json")
    scores = json.loads(shown.out)
    assert (scores["leading_tokens"], scores["tokens"]) == ("<s>", 2 * 31)
    text = load_tokenize(one_layer)(prose.read_text())
    middle = len(text) // 31 // 2 * 31
    tokens = torch.tensor([[1, *text[:31]], [1, *text[middle : middle + 31]]])
    expected = float(load_any(one_layer)(tokens, labels=tokens).loss)
    assert scores["loss"] == pytest.approx(expected, rel=1e-5)
    assert re.search(r"leading_tokens\W+<s>", cli("eval", one_layer, "--text", prose, "--seqlen", 32).out)


@pytest.mark.parametrize("begins", [True, False])
def test_a_run_says_what_its_windows_begin_with(cli, variant, prose, tmp_path, begins):
    model = variant()
    if not begins:  # the tokenizer knows the token and does not put it in front, as that of SmolLM2
        change_json(model / "tokenizer.json", post_processor=None)
    options = ["--scheme", "W4A16", "--group-size", 0, "--nsamples", 2, "--seqlen", 16, "--calibration", prose]
    shown = cli(model, *options, "--output-dir", tmp_path / "out")
    behind = ", each row behind <s>" if begins else ""
    assert f"quantizing on 2 calibration rows of 2 asked for, 32 tokens{behind}\n" in shown.err
    record = json.loads((tmp_path / "out" / "manifest.json").read_text())["calibration"]
    assert {name: record.get(name) for name in ("rows", "tokens", "leading_tokens")} == {
        "rows": 2,
        "tokens": 32,
        "leading_tokens": [1] if begins else None,
    }


def test_eval_ranks_sentences_with_an_encoder(cli, minilm, sts, tmp_path):
    few = tmp_path / "few.tsv"
    few.write_text("".join(sts[0].read_text().splitlines(keepends=True)[:60]))
    scores = json.loads(cli("eval", minilm, "--text", few, "--json").out)
    assert scores["spearman"] > 0.7
    assert 0 < scores["pairs"] < 60


@pytest.mark.slow
def test_verify_and_export_read_an_artifact_and_leave_it_as_it_is(cli, artifact_rtn, tmp_path, tree):
    before = tree(artifact_rtn)
    shown = cli("verify", artifact_rtn.directory)
    assert shown.code == 0
    assert f"{len(artifact_rtn.manifest['files'])} files as written" in shown.out
    shown = cli("export", artifact_rtn.directory, "--format", "onnx", "--output-dir", tmp_path / "onnx")
    assert shown.code == 0
    assert (tmp_path / "onnx" / "model.onnx").is_file()
    manifest = json.loads((tmp_path / "onnx" / "manifest.json").read_text())
    assert manifest["precisions"] == {"4-bit weights, float32 activations": 7, "float32": 1}
    assert sorted(manifest["parity"]) == ["activations", "emulation", "kl", "reference", "top1"]
    assert tree(artifact_rtn) == before
    exported = cli("verify", tmp_path / "onnx")  # it has a manifest of its own, and is no artifact
    assert exported.code in (1, 2)
    assert exported.err.startswith("error: ")
    again = cli("export", artifact_rtn.directory, "--format", "onnx", "--output-dir", tmp_path / "onnx")
    assert again.code == 2
    assert "exists already" in again.err
