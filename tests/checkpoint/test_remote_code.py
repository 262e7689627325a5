"""Code of a model's own runs where a person asks for it, and nowhere else."""

import logging

import pytest
import torch
from click.testing import CliRunner
from helpers.json_files import change_json, sign_again

from quantize.artifact.load import load
from quantize.checkpoint.opening import open_checkpoint
from quantize.cli import commands
from quantize.errors import QuantizeError, UsageError

CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM

Path(r"{marker}").write_text("ran")

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""
OWN = {
    "model_type": "own",
    "architectures": ["OwnForCausalLM"],
    "auto_map": {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"},
}
RTN = {"passes": [], "quantizer": {"name": "rtn"}}


@pytest.fixture
def marker(tmp_path):
    return tmp_path / "marker"


@pytest.fixture
def own(variant, marker):
    """Return a directory whose class of model is in a file of its own; running it writes `marker`."""
    model = variant(**OWN)
    (model / "modeling_own.py").write_text(CODE.format(marker=marker))
    return model


def test_code_does_not_run_unless_it_is_asked_for(own, marker):
    with pytest.raises(UsageError, match=r"no OwnForCausalLM, and code of the model's own \('modeling_own.Own.*only"):
        open_checkpoint(own)
    assert not marker.exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({}, r"code of the model's own \('modeling_x.M'\) runs only"),
        ({"AutoModel": "modeling_x.N"}, "its config names no code"),
    ],
)
def test_the_only_model_of_a_config_is_its_code_whatever_the_architecture_is_called(more, message, variant):
    own = {"AutoConfig": "modeling_x.C", "AutoModelForCausalLM": "modeling_x.M", **more}
    with pytest.raises(UsageError, match=f"no XForCausalLM, and {message}"):
        open_checkpoint(variant(model_type="x", architectures=["XForCausalLM"], auto_map=own))


def test_an_architecture_that_nobody_has_and_no_code(variant):
    with pytest.raises(UsageError, match=r"has no XForCausalLM, and its config names no code for --trust-remote-code"):
        open_checkpoint(variant(architectures=["XForCausalLM"]), trust_remote_code=True)


def test_a_run_with_code_of_the_model_s_own(own, one_layer, marker, small_run, caplog):
    with caplog.at_level(logging.WARNING, "quantize"):
        artifact = small_run(own, "W8A8", recipe=RTN, trust_remote_code=True)
    assert f"running code that {own} brings: modeling_own.py" in caplog.text
    assert artifact.manifest["remote_code"].keys() == {"modeling_own.py"}
    plain, ids = small_run(one_layer, "W8A8", "plain", recipe=RTN), torch.tensor([[3, 7, 11]])
    with torch.no_grad():
        assert torch.equal(artifact.load()(ids).logits, plain.load()(ids).logits)
    done = CliRunner().invoke(commands, ["verify", str(artifact.directory), "--trust-remote-code"])
    assert "output as recorded" in done.output
    marker.unlink()
    with pytest.raises(UsageError, match="runs only with --trust-remote-code"):
        load(artifact.directory)
    assert not marker.exists()
    assert type(load(artifact.directory, trust_remote_code=True)).__name__ == "OwnForCausalLM"
    (artifact.directory / "modeling_own.py").write_text(CODE.format(marker=marker) + "\n")
    with pytest.raises(QuantizeError, match=r"modeling_own.py is not as the run wrote it, so it is not run"):
        load(artifact.directory, trust_remote_code=True)
    sign_again(artifact.directory)
    load(artifact.directory, trust_remote_code=True)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("raise ValueError('no luck')", r"the code that .* brings does not run \(no luck\)"),
        ("OwnForCausalLM = 5", r"modeling_own.OwnForCausalLM of .* is no model of transformers"),
        (None, r"has no 'modeling_own.py', where its config says 'OwnForCausalLM' is"),
    ],
)
def test_code_that_does_not_work(content, message, own):
    (own / "modeling_own.py").unlink() if content is None else (own / "modeling_own.py").write_text(content)
    with pytest.raises(UsageError, match=message):
        open_checkpoint(own, trust_remote_code=True)


def test_code_on_the_hub_is_not_fetched(own):
    change_json(own / "config.json", auto_map={"AutoModelForCausalLM": "some/repo--modeling_own.OwnForCausalLM"})
    with pytest.raises(UsageError, match=r"has no 'some/repo--modeling_own.py'"):
        open_checkpoint(own, trust_remote_code=True)


def test_nothing_runs_and_nothing_is_taken_along_where_transformers_has_the_class(variant, marker):
    model = variant()
    (model / "modeling_own.py").write_text(CODE.format(marker=marker))
    found = open_checkpoint(model, trust_remote_code=True)
    assert found.code is None
    assert not [path for path in found.side_files if path.suffix == ".py"]
    assert not marker.exists()
