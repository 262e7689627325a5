"""A run leaves a page to look at and a model card, made of its manifest alone, and everything in them is escaped."""

import json
import re
import xml.etree.ElementTree as ElementTree

import pytest
import yaml
from helpers.json_files import sign_again

from quantize.artifact.report import figures, tables
from quantize.artifact.report.card import card
from quantize.artifact.report.findings import BlockRecord, InputRecord, findings_of
from quantize.artifact.report.page import page
from quantize.artifact.verify import verify_artifact
from quantize.errors import UsageError
from quantize.pipeline.quantize import quantize_model

HOSTILE = "<script>alert('x')</script>&\"`|$x$"


@pytest.fixture(scope="module")
def artifact(stories, stories_calibration, tmp_path_factory):
    """Quantize all layers with a smoothing pass and GPTQ, on few rows."""
    return quantize_model(
        stories,
        output_dir=tmp_path_factory.mktemp("report") / "out",
        scheme="W4A8",
        recipe={"passes": [{"name": "fold_norms"}, {"name": "rotate"}], "quantizer": {"name": "gptq"}},
        calibration=stories_calibration,
        group_size=0,
        nsamples=3,
        seqlen=32,
    )


def recipe_of(artifact):
    return (artifact.directory / "recipe.toml").read_text()


def test_the_page_is_a_part_of_the_artifact_and_says_what_the_run_found(artifact):
    text = (artifact.directory / "report.html").read_text()
    assert {"report.html", "README.md"} <= artifact.manifest["files"].keys()
    judged = artifact.manifest["held_out"]
    for figure in (judged["float"]["loss"], judged["plain_rounding"]["kl"], judged["quantized"]["kl"]):
        assert f"{figure:.4f}" in text
    assert "model.layers.0 to 4" in text  # schemes by layer
    assert "its root mean square is taken" in text  # why no more transforms
    drawn = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert len(drawn) == 4
    for svg in drawn:
        ElementTree.fromstring(svg)
    assert "http-equiv" in text
    assert not re.search(r'(src|href)="(?!#)', text)  # nothing is fetched


def test_the_page_is_made_of_the_manifest_alone_with_the_same_bytes(artifact, cli):
    path = artifact.directory / "report.html"
    written = path.read_bytes()
    assert page(artifact.manifest, recipe_of(artifact)).encode() == written
    path.write_text("lost")
    assert cli("report", artifact.directory).out == f"{path}: open it in a browser\n"
    assert path.read_bytes() == written
    assert verify_artifact(artifact.directory)["difference"] < 1e-2


def test_figures_of_blocks_linears_and_inputs_are_those_of_the_model(artifact):
    found = findings_of(artifact.manifest, "manifest")
    blocks, linears = found.report.blocks, found.report.linears
    assert list(blocks)[1:] == [f"model.layers.{i}" for i in range(5)]
    first, last = blocks["model.layers.0"], blocks["model.layers.4"]
    assert 0 < first.quantized < last.quantized < 1  # in the float model's coordinates, though the stream is rotated
    assert first.largest != first.transformed_largest
    assert linears.keys() == {path for path in found.quantization.modules if path.startswith("model.layers.")}
    assert all(x.quantized <= x.plain_rounding < 1 for x in linears.values())
    stages = found.report.inputs["model.layers.2.self_attn.q_proj"]
    assert [stage.stage for stage in stages.stages] == ["float", "fold_norms", "rotate"]
    assert len(stages.linears) == 3
    assert stages.stages[2].kurtosis < stages.stages[0].kurtosis
    assert {(x.name, x.bases) for x in found.report.passes} == {("fold_norms", 11), ("rotate", 6)}


@pytest.mark.slow
def test_a_run_that_goes_on_has_the_same_page(artifact, stories, stories_calibration, tmp_path, monkeypatch):
    from quantize.pipeline.sequential import SequentialPipeline

    process = SequentialPipeline.process

    def killed(self, segment, arriving, file):
        if segment.name == "model.layers.2":
            raise KeyboardInterrupt
        return process(self, segment, arriving, file)

    arguments = dict(
        output_dir=tmp_path / "out", recipe=artifact.directory / "recipe.toml", calibration=stories_calibration
    )
    monkeypatch.setattr(SequentialPipeline, "process", killed)
    with pytest.raises(KeyboardInterrupt):
        quantize_model(stories, **arguments)
    monkeypatch.undo()
    again = quantize_model(stories, **arguments, resume=True)
    assert (again.directory / "report.html").read_bytes() == (artifact.directory / "report.html").read_bytes()


def test_names_of_a_stranger_are_shown_and_not_run(artifact):
    bad = json.loads(json.dumps(artifact.manifest))
    bad["model"] |= {"architecture": HOSTILE, "base_model": HOSTILE}
    bad["held_out"]["warning"] = HOSTILE
    bad["report"]["bases"][0]["why_no_more"] = [HOSTILE]
    bad["report"]["inputs"] = {
        HOSTILE: {"linears": [HOSTILE], "stages": [{"stage": HOSTILE, "kurtosis": 3.0, "largest": 1.0}]}
    }
    bad["report"]["inputs"] |= {f"{HOSTILE}.1.x": next(iter(bad["report"]["inputs"].values()))}
    bad["report"]["linears"] = {f"a.{i}.{HOSTILE}": {"plain_rounding": 1.0, "quantized": 1.0} for i in range(2)}
    text = page(bad, f"# {HOSTILE}")
    assert "<script" not in text
    assert text.count("&lt;script") > 5
    written = card(bad, "", True, True)
    assert "<script" not in re.sub(r"\\[<>`|]", "", written).replace("\\", "")[written.index("# ") :]
    assert yaml.safe_load(written.split("---\n")[1])["base_model"] == HOSTILE


@pytest.mark.parametrize("key", ["bytes", "float_bytes", "seed"])
def test_numbers_that_no_run_writes_are_refused(artifact, key):
    for number in (10**400, -1):
        with pytest.raises(UsageError, match=rf"manifest.json: {key}: "):
            page({**artifact.manifest, key: number}, "")


def test_the_card_says_first_what_is_needed_and_what_each_runtime_takes(artifact):
    text = (artifact.directory / "README.md").read_text()
    _, metadata, body = text.split("---\n", 2)
    found = yaml.safe_load(metadata)
    assert found["library_name"] == "transformers"
    assert found["pipeline_tag"] == "text-generation"
    assert {"w4a8", "quantized"} <= set(found["tags"])
    assert (
        body.index("`import quantize`") < body.index("from transformers import AutoModelForCausalLM") < body.index("##")
    )
    assert "| vllm | `quantize-model export DIRECTORY --format compressed-tensors" in body
    refused = card({**artifact.manifest, "scheme": "NVFP4"}, "", True, True)
    assert "| onnxruntime | no: it has no product of FP4 values" in refused
    assert "skeleton=module" in card(artifact.manifest, "", False, False)


def test_a_hub_id_is_the_base_model(tmp_path):
    from quantize.checkpoint.checkpoint import Checkpoint

    snapshot = tmp_path / "models--someone--small-model" / "snapshots" / "abc"
    assert Checkpoint(snapshot, {}).hub_id == "someone/small-model"
    assert Checkpoint(tmp_path / "models--someone--small-model", {}).hub_id is None
    assert Checkpoint(None, {}).hub_id is None


def test_an_artifact_of_another_version_keeps_its_page(artifact_rtn, cli, tmp_path):
    import shutil

    old = tmp_path / "old"
    shutil.copytree(artifact_rtn.directory, old)
    (old / "report.html").unlink()
    sign_again(old)
    found = cli("report", old)
    assert found.code == 2
    assert "give -o FILE" in found.err
    assert cli("report", old, "-o", tmp_path / "page.html").code == 0
    assert "<svg" not in (tmp_path / "page.html").read_text()  # without passes and with one layer there is no curve
    assert cli("report", old, "-o", tmp_path / "page.html").code == 2  # exists
    sign_again(old, report={"blocks": {"a": {"plain_rounding": "much"}}})
    found = cli("report", old, "-o", tmp_path / "other.html")
    assert found.code == 2
    assert "report" in found.err
    (old / "recipe.toml").unlink()
    assert "recipe.toml" in cli("report", old, "-o", tmp_path / "other.html").err


def test_curves_take_what_is_not_finite_and_what_no_pass_changed():
    block = dict(
        plain_rounding=1.0, quantized=0.5, largest=1e4, median=1.0, transformed_largest=9.0, transformed_median=1.0
    )
    blocks = {str(i): BlockRecord(**block | {"largest": value}) for i, value in enumerate((1e4, float("nan"), 0.0))}
    assert figures.massive_activations(blocks).startswith("<svg")
    assert "largest, transformed" in figures.massive_activations(blocks)
    assert "median, transformed" not in figures.massive_activations(blocks)  # it would hide that of the float model
    assert figures.massive_activations({}) == figures.block_errors({"one": blocks["0"]}) == ""
    inputs = [
        InputRecord(linears=["a"], stages=[{"stage": name, "kurtosis": k, "largest": 1.0} for name, k in stages])
        for stages in ([("float", 9.0), ("rescale", 9.01), ("rotate", 3.0)], [("float", 8.0), ("rotate", 2.0)])
    ]
    assert figures.by_stage(inputs) == {"float model": [9.0, 8.0], "rotate": [3.0, 2.0]}


def test_experts_are_told_by_layer():
    tokens = {f"layers.{i}.experts.up": [i, 5, 9] for i in range(3)}
    assert figures.expert_tokens(tokens).count("<svg") == 1
    manifest = {
        "quantization": {"quant_method": "q", "scheme": {"weights": {"num_bits": 4}}, "modules": {}},
        "parity": {},
    }
    found = findings_of({"files": {}, "expert_tokens": tokens, **manifest}, "manifest")
    assert tables.experts(found).startswith("9 experts saw 0 to 9 calibration tokens; 1 saw none")
    assert "9 experts saw" in page({"expert_tokens": tokens, **manifest}, "")
