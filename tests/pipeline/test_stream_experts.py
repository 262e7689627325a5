"""Experts that are rounded without data go from file to file, and give the bytes that a whole layer gives."""

import json

import pytest
import torch
from helpers.mixtures import build_family
from safetensors.torch import load_file

from quantize.artifact.verify import verify_artifact
from quantize.calibration import spill
from quantize.calibration.runner import SequentialRunner
from quantize.checkpoint import expert_reader
from quantize.checkpoint.expert_reader import part_of, read_expert
from quantize.checkpoint.key_mapping import StoredTensor
from quantize.checkpoint.opening import open_checkpoint
from quantize.checkpoint.safetensors_writer import RowWriter
from quantize.pipeline import expert_weights, sequential
from quantize.pipeline.block import Block
from quantize.pipeline.plan import make_plan
from quantize.pipeline.prepare import prepare
from quantize.pipeline.quantize import quantize_model
from quantize.pipeline.steps import stream_experts
from quantize.pipeline.steps.stream_experts import streamed
from quantize.recipe.recipe import load_recipe

ROWS = torch.randint(2, 64, (4, 16), generator=torch.Generator().manual_seed(1))
PLAIN = {"passes": [], "quantizer": {"name": "rtn"}}
SETTINGS = {"nsamples": 4, "seqlen": 16, "group_size": 0}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("mixtral") / "model"
    build_family("mixtral").save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def prepared(directory):
    return prepare(directory, load_recipe("W4A16", PLAIN, **SETTINGS), ROWS)


def tensors(directory):
    found = {}
    for path in directory.glob("model*.safetensors"):
        found |= load_file(path)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["W4A8", "NVFP4"])
def test_experts_go_from_file_to_file_and_give_the_same_bytes(directory, tmp_path, monkeypatch, scheme):
    """Each expert is read alone: no stack is ever read whole."""
    settings = SETTINGS | {"group_size": None if scheme == "NVFP4" else 0}
    monkeypatch.setattr(
        expert_reader.Checkpoint, "compact_tensor", refused := no_stacks(expert_reader.Checkpoint.compact_tensor)
    )
    artifact = quantize_model(
        directory, output_dir=tmp_path / "out", scheme=scheme, recipe=PLAIN, calibration=ROWS, **settings
    )
    assert refused.seen and not any("experts" in name for name in refused.seen)
    names = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
    assert names["model.layers.1.mlp.experts.down_proj.qweight"].endswith("-experts.safetensors")
    assert verify_artifact(tmp_path / "out")["difference"] < 1e-5

    monkeypatch.undo()
    monkeypatch.setattr(sequential, "streamed", lambda *_: [])
    whole = quantize_model(
        directory, output_dir=tmp_path / "whole", scheme=scheme, recipe=PLAIN, calibration=ROWS, **settings
    )
    first, second = tensors(artifact.directory), tensors(whole.directory)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert artifact.manifest["quantization"] == whole.manifest["quantization"]
    assert artifact.manifest["coverage"] == whole.manifest["coverage"]


def no_stacks(read):
    """Return a method that notes which tensors are read."""

    def noted(self, name):
        noted.seen.append(name)
        return read(self, name)

    noted.seen = []
    return noted


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_experts_that_data_and_passes_touch_stream_as_well(family, tmp_path, monkeypatch):
    """They give the bytes of a run that holds them, in the gate, the reference and the referee as well."""
    build_family(family).save_pretrained(tmp_path / "model")
    found = {}
    for held in (stream_experts.HELD, 0):
        monkeypatch.setattr(stream_experts, "HELD", held)
        monkeypatch.setattr(
            expert_reader.Checkpoint, "float_tensor", read := no_stacks(expert_reader.Checkpoint.float_tensor)
        )
        out = tmp_path / f"out-{held}"
        artifact = quantize_model(tmp_path / "model", output_dir=out, scheme="W4A8", calibration=ROWS, **SETTINGS)
        assert any(name.endswith("experts.down_proj") for name in read.seen) == bool(held)
        assert bool([*out.glob("*-experts.safetensors")]) != bool(held)
        assert verify_artifact(out)["difference"] < 1e-5
        found[held] = tensors(out), artifact.manifest
        monkeypatch.undo()
    (whole, expected), (parts, manifest) = found.values()
    assert whole.keys() == parts.keys() and all(torch.equal(whole[name], parts[name]) for name in whole)
    assert manifest["expert_tokens"] == expected["expert_tokens"]
    assert manifest["coverage"] == expected["coverage"]
    losses = [found["held_out"]["quantized"]["loss"] for found in (manifest, expected)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)  # products with the turned weights are added up in turn


def test_experts_that_are_not_held_run_in_turns_over_batches_in_files(prepared, tmp_path, monkeypatch):
    program, checkpoint, reads = prepared.program, prepared.checkpoint, []
    monkeypatch.setattr(spill, "IN_MEMORY", 0)
    monkeypatch.setattr(spill, "SMALL", 0)
    monkeypatch.setattr(expert_weights, "read_expert", lambda *args: reads.append(args[2]) or read_expert(*args))
    layer = next(s for s in program.segments if any(x.experts for x in program.linears(s)))
    large = [x for x in program.linears(layer) if x.experts]
    states = [
        Block.read(checkpoint, program, layer, {}, torch.device("cpu"), apart).overrides() for apart in ([], large)
    ]
    head = Block.read(checkpoint, program, program.segments[0], {}, torch.device("cpu")).overrides()
    outputs = []
    for state, scratch in zip(states, (None, tmp_path), strict=True):
        runner = SequentialRunner(program, [ROWS[:2], ROWS[2:]], scratch)
        runner.run(program.segments[0].nodes, head)
        runner.run(layer.nodes, state)
        outputs.append([{n: x for n, x in values.items() if isinstance(x, torch.Tensor)} for values in runner.values])
    for whole, parts in zip(*outputs, strict=True):
        assert whole.keys() == parts.keys()
        for node in whole:
            torch.testing.assert_close(parts[node], whole[node])
    assert len(reads) == len(set(reads)) * len(large)  # once for each stack, whatever the number of batches


def test_what_data_or_a_pass_touches_is_not_streamed_unless_it_is_large(prepared, monkeypatch):
    program = prepared.program
    layer = next(s for s in program.segments if any(x.experts for x in program.linears(s)))

    def found(scheme, changes):
        plan = make_plan(load_recipe(scheme, changes, group_size=None), program)
        return [linear.path for linear in streamed(prepared.checkpoint, program, layer, plan)]

    paths = ["model.layers.0.mlp.experts.gate_up_proj", "model.layers.0.mlp.experts.down_proj"]
    assert found("W4A16", PLAIN | {"weights": {"group_size": 0}}) == paths
    assert found("W4A16", PLAIN | {"weights": {"group_size": 0}, "quantizer": {"name": "gptq"}}) == []
    assert found("W4A16", PLAIN | {"weights": {"group_size": 0}, "passes": [{"name": "rotate"}]}) == []
    assert found("NVFP4", PLAIN) == paths
    monkeypatch.setattr(stream_experts, "HELD", 0)  # larger layers are
    gptq = {"weights": {"group_size": 0}, "quantizer": {"name": "gptq"}}
    assert found("W4A16", PLAIN | gptq) == paths
    assert found("W4A16", PLAIN | gptq | {"calibrate_all_experts": True}) == []
    assert found("W4A16", PLAIN | gptq | {"tune": {"steps": 1}}) == []


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_an_expert_is_read_alone(family, tmp_path):
    """Mixtral's files hold three tensors for each expert, and those of gpt-oss a stack."""
    build_family(family).save_pretrained(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    for name in ("gate_up_proj", "down_proj"):
        path = f"model.layers.1.mlp.experts.{name}"
        whole = checkpoint.float_tensor(path)
        assert all(torch.equal(read_expert(checkpoint, path, e, 4), whole[e]) for e in range(4))
        assert checkpoint.on_meta(path).shape == whole.shape
        read = checkpoint.stored(path).names
        assert len(part_of(checkpoint.stored(path), 0, 4).names) < len(read) if family == "mixtral" else len(read) == 1


def test_parts_that_are_not_one_for_each_expert_are_read_whole():
    assert part_of(StoredTensor(("a.0", "a.1", "b"), ("a", "a", "b")), 0, 2) is None


def test_rows_are_written_into_their_places(tmp_path):
    whole = {"b": torch.arange(12, dtype=torch.int8).view(4, 3), "a": torch.randn(4, 2).to(torch.bfloat16)}
    with RowWriter(tmp_path / "x.safetensors", {name: x.to("meta") for name, x in whole.items()}) as writer:
        for first in (2, 0):
            for name, x in whole.items():
                writer.put(name, first, x[first : first + 2])
    found = load_file(tmp_path / "x.safetensors")
    assert found.keys() == whole.keys() and all(torch.equal(found[name], whole[name]) for name in whole)
