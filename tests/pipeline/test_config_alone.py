"""A dry run needs no weights: a config alone tells disk and memory."""

import pytest
import torch
from click.testing import CliRunner
from helpers.mixtures import build_family

from benchmarks.whole_models import MODELS, write_config
from quantize.checkpoint.opening import open_checkpoint
from quantize.cli import commands
from quantize.errors import QuantizeError, UsageError
from quantize.pipeline.estimate.report import preflight
from quantize.pipeline.prepare import prepare
from quantize.recipe.recipe import load_recipe

ROWS = torch.arange(64).view(4, 16)
SETTINGS = {"nsamples": 4, "seqlen": 16, "group_size": 0}
PLAIN = {"passes": [], "quantizer": {"name": "rtn"}}


def test_a_config_tells_what_files_of_weights_tell(tmp_path):
    model = build_family("mixtral").bfloat16()
    model.save_pretrained(tmp_path / "whole")
    model.config.architectures, model.config.dtype = ["MixtralForCausalLM"], "bfloat16"
    model.config.save_pretrained(tmp_path / "alone")
    found, whole = (
        preflight(prepare(tmp_path / name, load_recipe("W4A16", PLAIN, **SETTINGS), ROWS, read=False))
        for name in ("alone", "whole")
    )
    assert found.artifact_bytes() == pytest.approx(whole.artifact_bytes(), rel=0.01)
    assert found.parameter_count() == whole.parameter_count() == sum(p.numel() for p in model.parameters())
    assert found.float_bytes() == 2 * found.parameter_count()
    assert found.memory_bytes() == whole.memory_bytes()


@pytest.mark.slow
def test_the_command_estimates_a_config_alone_and_runs_nothing(tmp_path):
    write_config(tmp_path / "model", "qwen3_moe", MODELS["Qwen3-30B-A3B"][1] | {"num_hidden_layers": 2})
    done = CliRunner().invoke(
        commands, [str(tmp_path / "model"), "--scheme", "W4A16", "--dry-run", "-q"], catch_exceptions=False
    )
    assert done.exit_code == 0
    assert "model: 1,868,5" in done.output.splitlines()[0]
    assert "time: not measured without weights" in done.output


def test_other_commands_ask_for_weights(tmp_path):
    write_config(tmp_path / "model", "qwen3_moe", MODELS["Qwen3-30B-A3B"][1])
    with pytest.raises(UsageError, match=r"holds no \.safetensors weights"):
        open_checkpoint(tmp_path / "model")


def test_weights_that_can_hold_code_are_no_config_alone(tmp_path):
    write_config(tmp_path / "model", "qwen3_moe", MODELS["Qwen3-30B-A3B"][1])
    (tmp_path / "model" / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UsageError, match=r"pytorch_model\.bin, which can hold code"):
        open_checkpoint(tmp_path / "model", weights=False)


def test_a_config_alone_is_bounded_as_well(tmp_path):
    write_config(tmp_path / "model", "qwen3_moe", MODELS["Qwen3-30B-A3B"][1] | {"hidden_size": 1 << 24})
    with pytest.raises(QuantizeError, match="a far larger model than the largest models"):
        open_checkpoint(tmp_path / "model", weights=False)
