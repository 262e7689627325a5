"""Experts that add the least are dropped, in the model, in its config and in all that is indexed by experts."""

import json
from dataclasses import replace
from functools import partial

import pytest
import torch
import transformers
from click.testing import CliRunner
from helpers.mixtures import Mixture, build_family

from quantize.artifact.verify import verify_artifact
from quantize.cli import commands
from quantize.errors import QuantizeError, UsageError
from quantize.export.directory import export_artifact
from quantize.pipeline import prune
from quantize.pipeline.context import RunContext
from quantize.pipeline.prepare import prepare
from quantize.pipeline.prune import Pruning, as_pruned
from quantize.pipeline.pruned_model import prune_model
from quantize.pipeline.quantize import collect_stats, quantize_model
from quantize.pipeline.sequential import SequentialPipeline
from quantize.pipeline.steps.expert_saliency import collect_saliency
from quantize.recipe.recipe import load_recipe

ROWS = torch.randint(2, 64, (24, 16), generator=torch.Generator().manual_seed(1))
SETTINGS = {"nsamples": 24, "seqlen": 16, "group_size": 0}
PLAIN = {"passes": [], "quantizer": {"name": "rtn"}}


def recipe(ratio=0.5):
    return load_recipe("W4A16", PLAIN | {"prune": {"ratio": ratio}}, **SETTINGS)


@pytest.fixture(scope="module")
def mixtral():
    model = build_family("mixtral")
    return model, prepare(model, recipe(), ROWS)


@pytest.fixture(scope="module")
def directory(mixtral, tmp_path_factory):
    path = tmp_path_factory.mktemp("mixtral") / "model"
    mixtral[0].save_pretrained(path)
    return path


@torch.no_grad()
def expected_saliency(model, rows):
    """Return the mean of weight times norm for the experts of the first layer, from the modules themselves."""
    inputs, layer = [], model.model.layers[0].mlp
    hook = layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0].flatten(0, 1)))
    model(rows)
    hook.remove()
    x, stack = inputs[0], layer.experts
    weights, chosen = (x @ layer.gate.weight.T).softmax(-1).topk(2)
    weights = weights / weights.sum(-1, keepdim=True)
    found = []
    for e in range(4):
        gate, up = (x @ stack.gate_up_proj[e].T).chunk(2, -1)
        y = (torch.nn.functional.silu(gate) * up) @ stack.down_proj[e].T
        tokens, place = (chosen == e).nonzero(as_tuple=True)
        found.append((weights[tokens, place] * y[tokens].norm(dim=-1)).mean())
    return torch.stack(found)


def test_saliency_is_the_mean_of_the_routers_weight_times_the_norm_of_the_output(mixtral):
    model, prepared = mixtral
    found = collect_saliency(prepared, RunContext())
    seen = torch.stack([row["input_ids"] for row in prepared.samples.rows])
    torch.testing.assert_close(
        found.scores("model.layers.0.mlp.experts").float(), expected_saliency(model, seen), rtol=1e-4, atol=0
    )
    assert sum(found.tokens["model.layers.0.mlp.experts"]) == 2 * seen.numel()


def test_the_loss_is_that_of_the_float_model(mixtral):
    model, prepared = mixtral
    held = torch.stack([row["input_ids"] for row in prepared.held_out.rows])
    with torch.no_grad():
        wanted = float(model(held, labels=held).loss)
    assert collect_saliency(prepared, RunContext(), rows=False).loss == pytest.approx(wanted, rel=1e-5)


@pytest.mark.slow
def test_what_is_left_is_the_model_with_the_other_experts(directory, tmp_path):
    model = transformers.AutoModelForCausalLM.from_pretrained(directory)
    found = prune_model(directory, output_dir=tmp_path / "out", ratio=0.5, calibration=ROWS, nsamples=24, seqlen=16)
    pruned = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert pruned.config.num_local_experts == 2
    for number, (before, after) in enumerate(zip(model.model.layers, pruned.model.layers, strict=True)):
        layer = found.record["layers"][f"model.layers.{number}.mlp.experts"]
        assert layer["kept"] == sorted(torch.tensor(layer["saliency"]).argsort()[2:].tolist())
        for path in ("experts.gate_up_proj", "experts.down_proj", "gate.weight"):
            whole, part = (layers.mlp.get_parameter(path) for layers in (before, after))
            assert torch.equal(part, whole[layer["kept"]])
    assert torch.equal(pruned.lm_head.weight, model.lm_head.weight)
    assert json.loads((tmp_path / "out" / "pruning.json").read_text()) == found.record
    names = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
    assert "model.layers.0.block_sparse_moe.experts.1.w2.weight" in names  # as Mixtral's files have it
    assert "dropped 2 of 4 experts in 2 layers; the loss on rows held back goes from" in found.summary()


@pytest.mark.slow
def test_groups_keep_as_many_experts_each_and_corrections_go_with_them(tmp_path):
    model = build_family("deepseek_v3")
    model.model.layers[1].mlp.gate.e_score_correction_bias.copy_(torch.arange(8) / 100)
    model.save_pretrained(tmp_path / "model")
    found = prune_model(tmp_path / "model", output_dir=tmp_path / "out", ratio=0.7, calibration=ROWS, nsamples=24,
                        seqlen=16)  # fmt: skip
    (layer,) = found.record["layers"].values()
    assert found.record["dropped"] == 4  # of 5.6 what leaves as many in both groups
    assert [sum(e < 4 for e in layer["kept"]), sum(e >= 4 for e in layer["kept"])] == [2, 2]
    pruned = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert pruned.config.n_routed_experts == 4 and pruned.config.n_shared_experts == 1
    bias = pruned.model.layers[1].mlp.gate.e_score_correction_bias
    torch.testing.assert_close(bias, torch.tensor(layer["kept"]) / 100)
    assert pruned(ROWS[:1]).logits.isfinite().all()


@pytest.mark.slow
def test_a_run_that_prunes_goes_on_where_it_broke_off(directory, tmp_path, monkeypatch, tree):
    """The experts that stay are in the journal, and the bytes are those of a run that was left alone."""
    process, settings = SequentialPipeline.process, {"recipe": {"prune": {"ratio": 0.25}}, **SETTINGS}

    def failing(self, segment, *rest):
        if segment.name == "model.layers.1":
            raise QuantizeError("it broke")
        return process(self, segment, *rest)

    run = partial(quantize_model, directory, scheme="W4A8", calibration=ROWS, **settings)
    run(output_dir=tmp_path / "whole")
    monkeypatch.setattr(SequentialPipeline, "process", failing)
    with pytest.raises(QuantizeError, match="it broke"):
        run(output_dir=tmp_path / "out")
    monkeypatch.undo()
    monkeypatch.setattr(prune, "collect_saliency", None)  # nothing is measured again
    run(output_dir=tmp_path / "out", resume=True)
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


@pytest.mark.slow
def test_a_recipe_prunes_before_it_quantizes(directory, tmp_path):
    artifact = quantize_model(directory, output_dir=tmp_path / "out", scheme="W4A8", calibration=ROWS,
                              recipe={"prune": {"ratio": 0.25}}, **SETTINGS)  # fmt: skip
    pruning, held_out = artifact.manifest["pruning"], artifact.manifest["held_out"]
    assert (pruning["experts"], pruning["dropped"]) == (4, 1)
    assert "computes another function" in pruning["gate"]
    assert pruning["held_out_loss"]["after"] == pytest.approx(held_out["float"]["loss"], rel=1e-5)
    assert pruning["held_out_loss"]["before"] != pytest.approx(held_out["float"]["loss"], rel=1e-5)
    assert artifact.manifest["quantization"]["modules"]["model.layers.1.mlp.experts.down_proj"]["experts"] == 3
    assert artifact.load().config.num_local_experts == 3
    assert verify_artifact(tmp_path / "out")["difference"] < 1e-5


@pytest.mark.slow
def test_a_quantized_mixture_is_pruned_and_nothing_is_rounded_twice(directory, tmp_path):
    """By way of floating point, whose grids are found again."""
    first = quantize_model(directory, output_dir=tmp_path / "first", scheme="W4A16", calibration=ROWS, **SETTINGS)
    export_artifact(first.directory, "safetensors-float", tmp_path / "float")
    pruned = prune_model(tmp_path / "float", output_dir=tmp_path / "pruned", ratio=0.5, calibration=ROWS, nsamples=24,
                         seqlen=16)  # fmt: skip
    second = quantize_model(pruned.directory, output_dir=tmp_path / "second", scheme="W4A16", calibration=ROWS,
                            **SETTINGS)  # fmt: skip
    assert second.manifest["held_out"]["quantized"]["kl"] < 1e-9
    for path, layer in pruned.record["layers"].items():
        for name in ("gate_up_proj", "down_proj"):
            before, after = (a.load().get_submodule(f"{path}.{name}") for a in (first, second))
            kept = [before.expert(e).qtensor().dequantize() for e in layer["kept"]]
            torch.testing.assert_close(after.weights(), torch.stack(kept), rtol=0, atol=1e-6)


def test_a_dry_run_knows_the_shapes_that_stay(mixtral):
    _, prepared = mixtral
    found = as_pruned(prepared, recipe(0.5))
    assert {x.experts for x in found.program.all_linears if x.experts} == {2}
    assert as_pruned(prepared, load_recipe("W4A16", PLAIN, **SETTINGS)) is prepared


def test_of_equal_experts_the_first_stay(mixtral):
    pruning = Pruning.of(mixtral[1], 0.5)
    assert pruning.kept({mixture.path: torch.ones(4) for mixture in pruning.mixtures})[
        "model.layers.0.mlp.experts"
    ] == [0, 1]


def test_a_ratio_below_one_expert_is_refused(mixtral):
    with pytest.raises(
        UsageError, match=r"ratio = 0.2 of 4 experts in 1 groups is less than one in each; give at least 0.25"
    ):
        Pruning.of(mixtral[1], 0.2)


def test_too_few_experts_for_the_router_are_refused(mixtral):
    _, prepared = mixtral
    with pytest.raises(
        UsageError, match=r"prune leaves 1 of 4 experts, with which the model does not run .*smaller ratio"
    ):
        as_pruned(prepared, recipe(0.75))


def test_a_model_without_experts_is_refused(mixtral):
    _, prepared = mixtral
    dense = replace(prepared, program=replace(prepared.program, segments=()))
    with pytest.raises(UsageError, match="no stack of experts is found in the model; leave it out"):
        as_pruned(dense, recipe())


def test_a_module_without_a_config_is_refused():
    prepared = prepare(Mixture().eval(), recipe(), torch.randint(32, (24, 16)))
    with pytest.raises(UsageError, match="no number in the model's config is that of its 4 experts alone"):
        as_pruned(prepared, recipe())


@pytest.mark.parametrize("which", ["stats", "collect"])
def test_statistics_do_not_tell_which_experts_to_drop(which, tmp_path):
    with pytest.raises(UsageError, match="prune runs the calibration data"):
        if which == "stats":
            quantize_model("none", output_dir=tmp_path / "out", stats=tmp_path / "none", scheme="W4A16",
                           recipe={"prune": {"ratio": 0.5}})  # fmt: skip
        else:
            collect_stats("none", output=tmp_path / "out", recipe=recipe())


@pytest.mark.parametrize("ratio", [0, 1, 1.5])
def test_a_ratio_is_between_none_and_all(ratio):
    with pytest.raises(UsageError, match=r"prune\.ratio"):
        recipe(ratio)


@pytest.mark.slow
def test_the_command_prunes(directory, tmp_path):
    text = tmp_path / "ids.jsonl"
    text.write_text("\n".join(json.dumps({"input_ids": row.tolist()}) for row in ROWS))
    arguments = [
        "prune",
        str(directory),
        "--ratio",
        "0.5",
        "-o",
        str(tmp_path / "out"),
        "--calibration",
        str(text),
        "-q",
    ]
    done = CliRunner().invoke(commands, [*arguments, "--nsamples", "24", "--seqlen", "16"], catch_exceptions=False)
    assert done.exit_code == 0 and "dropped 2 of 4 experts" in done.output
    assert (tmp_path / "out" / "config.json").is_file()
