"""Stacks of experts in compressed-tensors checkpoints: apart, by the names that checkpoints have, and compared."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme
from helpers.mixtures import build_family
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from quantize.artifact.load import load
from quantize.checkpoint.key_mapping import linears_in_files, stored_name
from quantize.checkpoint.meta_model import build_skeleton
from quantize.errors import ExportError, QuantizeError, UsageError
from quantize.export import EXPORTERS
from quantize.export.comparison import (
    as_float_stack,
    copy_with_replaced_linears,
    relative_error,
    with_float_activations,
)
from quantize.export.compressed_tensors import experts, experts_apart, export, read_back
from quantize.export.compressed_tensors.format import group
from quantize.export.directory import export_artifact
from quantize.export.hf_checkpoint import disable_rounding
from quantize.export.outline import Outline
from quantize.graph.export import export_program, quiet

CT = "compressed-tensors"
UP, DOWN = "model.layers.0.mlp.experts.gate_up_proj", "model.layers.0.mlp.experts.down_proj"
W8A8 = {"weights": {"num_bits": 8}, "activations": {"num_bits": 8}}


@pytest.fixture(scope="module")
def written(artifact_mixture, tmp_path_factory):
    """The checkpoint of the mixture, and how far it was found to be from the artifact."""
    directory = tmp_path_factory.mktemp("ct") / "out"
    return directory, export_artifact(artifact_mixture.directory, CT, directory)


def test_experts_have_the_names_that_checkpoints_have(written, artifact_mixture):
    """Gate and up are the two halves of one stack, w1 and w3 in files; the router has another name there as well."""
    directory, _ = written
    tensors = {name: x for path in sorted(directory.glob("*.safetensors")) for name, x in load_file(path).items()}
    stack = load(artifact_mixture.directory).get_submodule(UP)
    args = QuantizationScheme(**group(stack.scheme, ["Linear"]))
    for e in range(4):
        W = stack.expert(e).qtensor().dequantize()
        for name, rows in (("w1", slice(48)), ("w3", slice(48, 96))):
            path = f"model.layers.0.block_sparse_moe.experts.{e}.{name}."
            parts = {key.removeprefix(path): x for key, x in tensors.items() if key.startswith(path)}
            assert parts.keys() == {"weight_packed", "weight_scale", "weight_shape"}
            compressor = BaseCompressor.get_value_from_registry("pack-quantized")
            assert torch.equal(compressor.decompress(parts, args)["weight"], W[rows])
    assert "model.layers.0.block_sparse_moe.gate.weight" in tensors
    assert not [name for name in tensors if ".mlp." in name]


def test_transformers_computes_what_the_artifact_computes(written, artifact_mixture):
    directory, parity = written
    assert parity["reference"] < 1e-6 < 1e-3 < parity["activations"]
    ids = torch.arange(2, 34)[None]
    with quiet(), torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(directory, dtype="auto")
        found = model.apply(disable_rounding)(ids).logits
        artifact = copy_with_replaced_linears(
            load(artifact_mixture.directory), with_float_activations, lambda x: as_float_stack(x, torch.float32)
        )
        assert relative_error([found], [artifact(ids).logits]) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v3", "glm4_moe", "qwen3_next"])
def test_transformers_loads_other_families(family, artifact_mixture, small_run, tmp_path):
    """Routers with shared experts, groups and corrections; the comparison loads the checkpoint."""
    changes = {"deepseek_v3": {"first_k_dense_replace": 0}, "glm4_moe": {"first_k_dense_replace": 0}}
    changes["qwen3_next"] = {"layer_types": ["full_attention"]}
    build_family(family, num_hidden_layers=1, **changes.get(family, {})).save_pretrained(tmp_path / "model")
    recipe = {"passes": [], "quantizer": {"name": "rtn"}, "weights": {"symmetric": True}}
    ids = artifact_mixture.directory.parent / "ids.jsonl"
    artifact = small_run(tmp_path / "model", "W4A16", recipe=recipe, calibration=ids, group_size=16)
    assert any("experts" in entry for entry in artifact.manifest["quantization"]["modules"].values())
    assert export_artifact(artifact.directory, CT, tmp_path / "ct")["reference"] < 1e-5


def outline_of(family: str, scheme: dict, **others: dict) -> Outline:
    """The outline of a mixture whose stacks are quantized; `others` are entries of single stacks."""
    model = build_family(family, num_hidden_layers=1)
    stacks = {name: p for name, p in model.named_parameters() if p.dim() == 3 and ".experts." in name}
    entry = {"transposed": family in ("gpt_oss", "llama4_text")}
    modules = {
        name: {"columns": p.shape[-1], "experts": len(p)} | entry | others.get(name.rpartition(".")[2], {})
        for name, p in stacks.items()
    }
    config = model.config.to_dict() | {"architectures": [type(model).__name__]}
    return Outline(config, {"scheme": scheme, "modules": modules}, model.to("meta"))


APART = ["gpt_oss", "granitemoe", "llama4_text"]


@pytest.mark.slow
@pytest.mark.parametrize("family", APART)
def test_experts_that_checkpoints_hold_as_one_tensor_are_written_apart(
    family, artifact_mixture, small_run, tmp_path, monkeypatch
):
    """As llm-compressor names them; the float model with what the package unpacks computes what the artifact does."""
    model = build_family(family, num_hidden_layers=1)
    model.save_pretrained(tmp_path / "model")
    recipe = {"passes": [], "quantizer": {"name": "rtn"}, "weights": {"symmetric": True}}
    ids = artifact_mixture.directory.parent / "ids.jsonl"
    artifact = small_run(tmp_path / "model", "W4A16", recipe=recipe, calibration=ids, group_size=16)
    parity = export_artifact(artifact.directory, CT, tmp_path / "ct")
    assert parity["reference"] == parity["tensors"] == 0 and "not at all" in parity["transformers"]

    stack = next(name for name, p in model.named_parameters() if p.dim() == 3 and "gate_up" in name)
    tensors = {name: x for path in (tmp_path / "ct").glob("*.safetensors") for name, x in load_file(path).items()}
    quantized, owner = load(artifact.directory).get_submodule(stack), stack.rpartition(".")[0]
    W, args = quantized.expert(3).qtensor().dequantize(), QuantizationScheme(**group(quantized.scheme, ["Linear"]))
    turns = family == "gpt_oss"
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    for name, rows in (("gate_proj", W[::2] if turns else W[:32]), ("up_proj", W[1::2] if turns else W[32:])):
        parts = {key: tensors[f"{owner}.3.{name}.{key}"] for key in ("weight_packed", "weight_scale", "weight_shape")}
        assert torch.equal(compressor.decompress(parts, args)["weight"], rows)
        bias = model.get_parameter(f"{stack}_bias")[3, 0 if name == "gate_proj" else 1 :: 2] if turns else None
        assert bias is None or torch.equal(tensors[f"{owner}.3.{name}.bias"], bias)
    assert not [name for name in tensors if name.startswith(stack) or name.endswith("proj_bias")]
    config = json.loads((tmp_path / "ct" / "config.json").read_text())["quantization_config"]
    assert owner not in config["ignore"] and f"{owner.rpartition('.')[0]}.router" in config["ignore"]

    if turns:
        joined = read_back.joined
        monkeypatch.setattr(read_back, "joined", lambda parts, read: joined(parts, read).roll(1, 0))
        with pytest.raises(QuantizeError, match="differs from the artifact by"):
            export_artifact(artifact.directory, CT, tmp_path / "no")


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt_oss", "llama4_text"])
def test_a_runtime_that_reads_no_experts_apart_is_not_said_to_execute_them(family):
    outline = graphed(outline_of(family, {"weights": {"num_bits": 4, "group_size": 16}}))
    EXPORTERS[CT].check(outline)
    assert "in one tensor and reads no others" in EXPORTERS[CT].not_executed("transformers", outline)
    why = EXPORTERS[CT].not_executed("vllm", outline)
    assert ("take turns" in why) == (family == "gpt_oss") == bool(why)
    line = export.how_to_serve("OUT", outline, outline.schemes(), experts.written_parts(outline))
    assert line == (f"vLLM does not serve it: {why}" if why else "to serve it: vllm serve OUT")


@pytest.mark.slow
def test_stacks_whose_parts_are_not_known_are_refused(monkeypatch):
    """Each clause of the refusal, on one graph: names, what lies between, and what else the module holds."""
    outline = graphed(outline_of("granitemoe", W8A8))
    holds = r"block_sparse_moe\.experts\.down_proj, which checkpoints of GraniteMoeForCausalLM hold as one tensor, "
    remedy = r"; quantize with --ignore 're:\.\*experts\.\*'"

    def refused(words):
        with pytest.raises(UsageError, match=f"{holds}{words}{remedy}"):
            EXPORTERS[CT].check(outline)

    with monkeypatch.context() as changed:
        changed.setattr(experts_apart, "part_names", lambda path: [path])
        refused("and the names of its stacks do not tell the linears in them")
    with monkeypatch.context() as changed:
        changed.setattr(experts_apart, "swiglu_of", lambda between, width: None)
        refused("and what lies between the products of its experts is no SwiGLU")
    node = next(node for node, name in outline.program.parameters.items() if name.endswith("norm.weight"))
    with monkeypatch.context() as changed:
        changed.setitem(outline.program.parameters, node, "model.layers.0.block_sparse_moe.experts.gain")
        refused(r"and its module holds model\.layers\.0\.block_sparse_moe\.experts\.gain as well")
    unknown = ExportError("it asks for values")
    with monkeypatch.context() as changed:
        changed.setattr(Outline, "program", property(lambda outline: (_ for _ in ()).throw(unknown)))
        refused(r"and the model cannot be exported \(it asks for values\)")
    modules = {path: entry for path, entry in outline.settings["modules"].items() if "down" not in path}
    with pytest.raises(UsageError, match="experts of several schemes"):
        EXPORTERS[CT].check(replace(outline, settings=outline.settings | {"modules": modules}))


def graphed(outline: Outline) -> Outline:
    """An outline with the graph of its model."""
    return replace(outline, exported=export_program(build_skeleton(outline.config)))


NVFP4 = {"num_bits": 4, "format": "nvfp4"}
REFUSED = [
    (
        W8A8,
        {"scheme": {"weights": {"num_bits": 8, "group_size": 8}}},
        "several schemes or group sizes; quantize with one",
    ),
    (W8A8 | {"weights": {"num_bits": 8, "symmetric": False}}, {}, "zero points; quantize with `symmetric = true`"),
    ({"weights": NVFP4 | {"group_size": 16}, "activations": NVFP4}, {}, "experts of NVFP4; quantize with an entry"),
]


@pytest.mark.parametrize(("scheme", "down", "words"), REFUSED)
def test_experts_that_no_reader_takes_are_refused(scheme, down, words):
    with pytest.raises(UsageError, match=words):
        EXPORTERS[CT].check(outline_of("mixtral", scheme, down_proj=down))


def test_experts_that_are_quantized_in_part_are_refused():
    outline = outline_of("mixtral", W8A8)
    EXPORTERS[CT].check(outline)
    modules = {path: entry for path, entry in outline.settings["modules"].items() if "down" not in path}
    with pytest.raises(UsageError, match="experts of several schemes"):
        EXPORTERS[CT].check(replace(outline, settings=outline.settings | {"modules": modules}))


EXECUTED = [(4, 16, 16, True, True), (4, 8, 16, True, False), (4, 4, 0, True, False), (8, 8, 0, False, True)]


@pytest.mark.parametrize(
    ("bits", "activations", "group_size", "transformers", "vllm"), [*EXECUTED, (8, 8, 16, False, False)]
)
def test_a_target_says_which_experts_it_executes(bits, activations, group_size, transformers, vllm):
    args = {} if activations == 16 else {"activations": {"num_bits": activations}}
    outline = outline_of("qwen3_moe", {"weights": {"num_bits": bits, "group_size": group_size}} | args)
    for runtime, executes in (("transformers", transformers), ("vllm", vllm)):
        why = EXPORTERS[CT].not_executed(runtime, outline)
        assert bool(why) != executes
        assert not why or f"W{bits}A{activations}" in why


def test_a_run_for_a_target_that_executes_no_such_experts_is_refused(cli, artifact_mixture, tmp_path):
    model, ids = (artifact_mixture.directory.parent / name for name in ("model", "ids.jsonl"))
    arguments = ["--nsamples", 2, "--seqlen", 16, "--calibration", ids, "--group-size", 16]
    shown = cli(model, "--scheme", "W4A8", "--target", "vllm", *arguments, "--output-dir", tmp_path / "no")
    assert shown.code == 2
    assert "vllm cannot execute the result: it has no product of experts in W4A8; quantize with W4A16" in shown.err
    assert not (tmp_path / "no").exists()


def test_linears_in_files_are_read_from_the_mapping_of_transformers():
    model = build_family("qwen3_moe", num_hidden_layers=1)
    found = linears_in_files(model, UP, False)
    assert list(found) == [
        f"model.layers.0.mlp.experts.{e}.{name}" for name in ("gate_proj", "up_proj") for e in range(8)
    ]
    assert found["model.layers.0.mlp.experts.3.up_proj"].tolist() == list(range(3 * 64 + 32, 4 * 64))
    assert linears_in_files(build_family("gpt_oss", num_hidden_layers=1), UP, True) == {}
    mixtral = build_family("mixtral", num_hidden_layers=1)
    assert stored_name(mixtral, "model.layers.0.mlp.gate.weight") == "model.layers.0.block_sparse_moe.gate.weight"
    assert stored_name(mixtral, DOWN) == DOWN  # which files hold in parts


@pytest.mark.slow
def test_experts_in_bytes_are_compared_number_by_number(artifact_mixture, small_run, tmp_path, monkeypatch):
    """Transformers reads no such experts. The mixture has linears of another scheme, too."""
    model, ids = (artifact_mixture.directory.parent / name for name in ("model", "ids.jsonl"))
    recipe = {"passes": [], "quantizer": {"name": "rtn"}, "weights": {"symmetric": True}}
    recipe["layers"] = [{"match": "re:.*experts.*", "scheme": "W8A8"}]
    artifact = small_run(model, "W4A8", recipe=recipe, calibration=ids, group_size=16)
    assert export_artifact(artifact.directory, CT, tmp_path / "ct") == {"tensors": 0}
    groups = json.loads((tmp_path / "ct" / "config.json").read_text())["quantization_config"]["config_groups"]
    pattern = r"re:model\.layers\.0\.block_sparse_moe\.experts\.\d+\..*"
    assert [pattern] in [group["targets"] for group in groups.values()]
    rows_of = experts.rows_of
    monkeypatch.setattr(export, "rows_of", lambda weight, rows: rows_of(weight, rows.flip(0)))
    with pytest.raises(QuantizeError, match="differs from the artifact by"):
        export_artifact(artifact.directory, CT, tmp_path / "no")
