"""Ordinary checkpoints of dequantized weights: loaded by transformers, they are the artifact with float activations."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import transformers
from helpers.json_files import change_json
from helpers.soundness import CONFIGS
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer
from transformers.pytorch_utils import Conv1D

from quantize.artifact.load import load
from quantize.checkpoint.files_seen import sha256
from quantize.errors import QuantizeError, UsageError
from quantize.export import EXPORTERS
from quantize.export.comparison import copy_with_replaced_linears, relative_error, with_float_activations
from quantize.export.directory import export_artifact
from quantize.export.outline import Outline
from quantize.export.safetensors_float import export
from quantize.export.safetensors_float.dequantize import float_linear, is_transposed, with_noise
from quantize.graph.export import quiet
from quantize.nn.quantized_linear import QuantizedLinear
from quantize.quantizers.rtn import RoundToNearest
from quantize.scheme.scheme import Scheme, WeightArgs
from quantize.transforms.online import Dual, Hadamard, Shift

RTN = {"quantizer": {"name": "rtn"}, "passes": []}
TARGET = "safetensors-float"
FLOAT32 = 2**-18  # a few last bits, relative to the output
UP = "model.layers.0.mlp.up_proj"


def exported(artifact, output, cls=AutoModelForCausalLM):
    """Parity, what transformers loads in the checkpoint's own type, and the tensors by name."""
    parity = export_artifact(artifact.directory, TARGET, output)
    with quiet():
        model = cls.from_pretrained(output, dtype="auto")
    return (
        parity,
        model.eval(),
        {name: x for path in output.glob("*.safetensors") for name, x in load_file(path).items()},
    )


def logits(model, vocabulary=512):
    tokens = torch.randint(vocabulary, (2, 12), generator=torch.Generator().manual_seed(3))
    with quiet(), torch.no_grad():
        return model(tokens)[0]


def with_float(artifact):
    return copy_with_replaced_linears(load(artifact.directory), with_float_activations)


def test_a_rotated_model(artifact_one_layer, one_layer, tmp_path):
    """The default of W4A4, which transforms inputs of o_proj and down_proj, and clips."""
    parity, model, tensors = exported(artifact_one_layer, tmp_path / "out")
    assert parity["reference"] < FLOAT32 < 1e3 * FLOAT32 < parity["activations"]
    assert relative_error([logits(model)], [logits(with_float(artifact_one_layer))]) < FLOAT32
    original = load_file(one_layer / "model.safetensors")
    kept = {name for name in original if ".layers." not in name or ".layers.0." in name}
    assert tensors.keys() == kept | {"lm_head.weight"}  # rotating unties
    assert {x.dtype for x in tensors.values()} == {torch.float32}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config
    assert config.keys() == json.loads((one_layer / "config.json").read_text()).keys()
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
    shards = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert shards == [f"model-{n:05}-of-{len(shards):05}.safetensors" for n in range(1, len(shards) + 1)]
    assert (index.keys(), set(index.values())) == (tensors.keys(), set(shards))
    tokens = AutoTokenizer.from_pretrained(tmp_path / "out")("Once upon", return_tensors="pt")["input_ids"]
    with quiet():
        assert len(model.generate(tokens, max_new_tokens=3, do_sample=False)[0]) == tokens.numel() + 3


def test_weights_alone_are_stored_as_they_are_and_once_where_tied(artifact_rtn, one_layer, tmp_path):
    parity, model, tensors = exported(artifact_rtn, tmp_path / "out")
    assert (parity["reference"], parity["activations"]) == (0, 0)
    linears = {path: m for path, m in load(artifact_rtn.directory).named_modules() if isinstance(m, QuantizedLinear)}
    original = load_file(one_layer / "model.safetensors")
    assert "lm_head.weight" not in tensors
    for name, tensor in tensors.items():
        path = name.removesuffix(".weight")
        assert torch.equal(tensor, linears[path].qtensor().dequantize() if path in linears else original[name]), name
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(logits(model), logits(load(artifact_rtn.directory)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_in_half_precision(dtype, one_layer, small_run, tmp_path):
    """Each weight is rounded once, from what the artifact's is in float64."""
    shutil.copytree(one_layer, tmp_path / "model")
    half = {name: x.to(dtype) for name, x in load_file(one_layer / "model.safetensors").items()}
    save_file(half, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    change_json(tmp_path / "model" / "config.json", dtype=str(dtype).removeprefix("torch."))
    recipe = {"quantizer": {"name": "rtn"}, "passes": [{"name": "fold_norms"}, {"name": "rotate"}]}
    artifact = small_run(tmp_path / "model", "W4A4", recipe=recipe)
    parity, model, tensors = exported(artifact, tmp_path / "checkpoint")
    assert {x.dtype for x in tensors.values()} == {dtype} == {model.dtype}
    assert torch.finfo(dtype).eps / 64 < parity["reference"] < 2 * parity["rounding"] < 3 * torch.finfo(dtype).eps
    for path, linear in load(artifact.directory).named_modules():
        if isinstance(linear, QuantizedLinear):
            assert torch.equal(tensors[f"{path}.weight"], float_linear(linear)[0].to(dtype)), path
    assert f"plain {str(dtype).removeprefix('torch.')} values" in (tmp_path / "checkpoint" / "README.md").read_text()


@pytest.mark.parametrize("scheme", ["W8A8", "W6A6", "MXFP4", "NVFP4", "NF4"])
def test_other_formats(scheme, small_run, one_layer, tmp_path):
    groups = {"group_size": None, "ignore": ["down_proj"]} if "FP4" in scheme else {}
    weights = {"weights": {"format": "nf4"}} if scheme == "NF4" else {}
    artifact = small_run(one_layer, "W4A16" if weights else scheme, recipe=RTN | weights, **groups)
    _, model, _ = exported(artifact, tmp_path / "checkpoint")
    assert relative_error([logits(model)], [logits(with_float(artifact))]) < FLOAT32


def test_linears_with_schemes_of_their_own(small_run, one_layer, tmp_path):
    layers = [{"match": "o_proj", "scheme": "W8A8"}, {"match": "up_proj", "scheme": "NVFP4"}]
    artifact = small_run(one_layer, "W4A16", recipe=RTN | {"layers": layers})
    _, model, _ = exported(artifact, tmp_path / "checkpoint")
    assert relative_error([logits(model)], [logits(with_float(artifact))]) < FLOAT32
    card = (tmp_path / "checkpoint" / "README.md").read_text().splitlines()
    assert "- activations of the artifact: 5 × floating point; 1 × 8 bits; 1 × NVFP4" in card


@pytest.mark.parametrize(
    "passes",
    [
        [{"name": "runtime_smooth", "group_size": 4}],
        [{"name": "noisy_bias", "mean_shift": True}],
        [{"name": "adaptive_rotation"}],
    ],
)
def test_what_is_done_to_inputs_is_in_the_weights(passes, small_run, one_layer, tmp_path):
    scheme = "W6A6" if passes[0]["name"] == "noisy_bias" else "W4A4"
    artifact = small_run(one_layer, scheme, recipe={"quantizer": {"name": "rtn"}, "passes": passes})
    _, model, tensors = exported(artifact, tmp_path / "checkpoint")
    assert not [name for name in tensors if not name.endswith(".weight")]
    assert relative_error([logits(model)], [logits(with_float(artifact))]) < FLOAT32


def test_an_encoder_with_biases_that_take_a_shift_back(small_run, minilm, tmp_path):
    shutil.copytree(minilm, tmp_path / "model")
    change_json(tmp_path / "model" / "config.json", num_hidden_layers=1)
    recipe = {"quantizer": {"name": "rtn"}, "passes": [{"name": "noisy_bias", "mean_shift": True}]}
    artifact = small_run(tmp_path / "model", "W6A6", recipe=recipe, calibration=None)
    settings = artifact.manifest["quantization"]["modules"].values()
    assert any(online["kind"] == "shift" for entry in settings for online in entry.get("online", ()))
    parity, model, tensors = exported(artifact, tmp_path / "checkpoint", AutoModel)
    assert parity["reference"] < FLOAT32
    assert relative_error([logits(model)], [logits(with_float(artifact))]) < FLOAT32
    original = load_file(minilm / "model.safetensors")
    own = [name for name in tensors if name.endswith("query.bias")]
    assert own and all(torch.allclose(tensors[name], original[name], atol=1e-5) for name in own)


def transform(kind, columns):
    generator = torch.Generator().manual_seed(5)
    if kind is Hadamard:
        return Hadamard(columns // 2, stride=2)
    if kind is Shift:
        return Shift(torch.randn(columns, generator=generator))
    blocks = [torch.linalg.qr(torch.randn(columns // 8, 8, 8, generator=generator))[0] for _ in range(2)]
    return Dual(blocks[0], torch.randperm(columns, generator=generator), blocks[1])


@pytest.mark.parametrize("kinds", [[Hadamard], [Dual], [Shift], [Shift, Hadamard], [Dual, Shift, Hadamard]])
@pytest.mark.parametrize("has_bias", [False, True])
def test_a_linear_is_the_same_function(kinds, has_bias):
    generator = torch.Generator().manual_seed(0)
    W, bias = torch.randn(28, 88, generator=generator), torch.randn(28, generator=generator)
    args = WeightArgs(num_bits=4, group_size=8, symmetric=False)
    online = [transform(kind, 88) for kind in kinds]
    weight = RoundToNearest().quantize(W, args, None, torch.float32)
    linear = QuantizedLinear(weight, bias if has_bias else None, Scheme(weights=args), online)
    x = torch.randn(50, 88, generator=generator, dtype=torch.float64)
    expected = linear.transform(x) @ weight.dequantize().double().T + (bias if has_bias else 0)
    found, own = float_linear(linear)
    assert found.dtype == torch.float64
    assert relative_error([x @ found.T + (0 if own is None else own)], [expected]) < 1e-14
    assert (own is None) == (not has_bias and Shift not in kinds)


def test_noise_is_as_large_as_it_says():
    linear = QuantizedLinear(
        RoundToNearest().quantize(torch.randn(64, 64), WeightArgs(num_bits=4), None, torch.float32),
        None,
        Scheme(weights=WeightArgs(num_bits=4)),
    )
    W = linear.qtensor().dequantize()
    off = ((with_noise(linear, 0.01).weight - W) / W)[W != 0]
    assert 0.009 < float(off.abs().max()) <= 0.01001
    assert abs(float(off.mean())) < 0.001
    assert torch.equal(with_noise(linear, 0.01).weight, with_noise(linear, 0.01).weight)


class Doubled(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4, 6, device="meta"))

    def forward(self, x):
        return 2 * x @ self.weight.T


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (nn.Linear(6, 4), False),
        (nn.Linear(6, 6), False),
        (Conv1D(4, 6).to("meta"), True),
        (Conv1D(6, 6).to("meta"), True),
        (Doubled(), None),
        (nn.Embedding(4, 6), None),
        (nn.LayerNorm(6), None),
    ],
)
def test_how_a_module_holds_its_weight_is_seen_by_running_it(module, expected):
    assert is_transposed(module, 6) is expected


@pytest.mark.parametrize("name", ["gpt2", "mixtral"])
def test_names_and_shapes_are_those_that_transformers_saves(name, small_run, tmp_path):
    """Transposed weights in the one; merged experts, which stay in floating point, and a router in the other."""
    config = json.loads(CONFIGS[name].read_text()) | {"vocab_size": 512}
    torch.manual_seed(0)
    cls = getattr(transformers, config["architectures"][0])
    float_model = cls(cls.config_class.from_dict(config)).eval()
    float_model.save_pretrained(tmp_path / "model")
    artifact = small_run(tmp_path / "model", "W4A4", recipe=RTN, ignore=["re:.*experts.*"] * (name == "mixtral"))
    _, model, tensors = exported(artifact, tmp_path / "checkpoint")
    saved = load_file(tmp_path / "model" / "model.safetensors")
    assert {name: x.shape for name, x in tensors.items()} == {name: x.shape for name, x in saved.items()}
    assert relative_error([logits(model)], [logits(with_float(artifact))]) < FLOAT32


def test_it_loads_without_our_package(artifact_one_layer, tmp_path):
    export_artifact(artifact_one_layer.directory, TARGET, tmp_path / "out")
    source = (
        "import sys, torch, transformers\n"
        "model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "print(float(model(torch.arange(9)[None]).logits.double().norm()))\n"
        "assert not [name for name in sys.modules if name.split('.')[0] == 'quantize']\n"
    )
    run = subprocess.run(
        [sys.executable, "-I", "-c", source, tmp_path / "out"], cwd=tmp_path, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    with torch.no_grad():
        expected = with_float(artifact_one_layer)(torch.arange(9)[None]).logits.double().norm()
    assert float(run.stdout) == pytest.approx(float(expected), rel=1e-5)


def test_the_card_says_what_was_done(cli, artifact_one_layer, tmp_path):
    shown = cli("export", artifact_one_layer.directory, "--format", TARGET, "--output-dir", tmp_path / "out")
    assert shown.code == 0
    figures = r"outputs \S+, the artifact with its weights in the file's type \S+, the artifact without rounded \S+ \S+"
    said = f"{re.escape(str(tmp_path))}/out: relative differences from the artifact: {figures}\n"
    assert re.fullmatch(said, shown.out)
    card, manifest = (tmp_path / "out" / "README.md").read_text(), artifact_one_layer.manifest
    own = json.loads((tmp_path / "out" / "manifest.json").read_text())
    for line in [
        "# LlamaForCausalLM: weights of W4A4 in floating point",
        "- weights: 7 × 4-bit integers, with zero points, one scale for each channel; "
        "1 × 8-bit integers, symmetric, one scale for each channel",
        "- tables of words: 1 × 8-bit integers, symmetric, one scale for each channel",
        "- activations of the artifact: 7 × 4 bits; 1 × floating point",
        "- passes: rescale, fold_norms, learned_rotation, activation_clip",
        "- transforms in front of linears in the artifact: 2 × hadamard; each is multiplied into the weight behind it "
        "here, or added to its bias",
        "- quantizer: gptaq",
        f"- calibration: 2 rows, 32 tokens, SHA-256 `{manifest['calibration']['sha256']}`",
        "- seed: 0",
    ]:
        assert line in card.splitlines()
    assert "**Activations are not quantized in this checkpoint; in the artifact" in card
    assert f"output by {own['parity']['activations']:.1e} of" in card
    assert f"learned_rotation {max(manifest['gate']['passes']['learned_rotation'].values()):.1e}" in card
    assert f"fake_quant {manifest['parity']['fake_quant']:.1e}, triton not verified" in card
    assert f"activations in floating point: {own['parity']['reference']:.1e}, where" in card
    assert (artifact_one_layer.directory / "recipe.toml").read_text() in card
    digest = sha256(artifact_one_layer.directory / "manifest.json")
    assert f"`{digest}`" in card
    assert own["artifact"] == digest


def test_the_card_of_weights_alone(artifact_rtn, tmp_path):
    export_artifact(artifact_rtn.directory, TARGET, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "leaves activations in floating point, too: it computes the same." in card
    assert "Activations are not quantized" not in card
    for line in (
        "- tables of words: floating point",
        "- activations of the artifact: 7 × floating point",
        "- passes: none",
        "- transforms in front of linears in the artifact: none",
        "- quantizer: rtn",
    ):
        assert line in card.splitlines()


@pytest.mark.parametrize(
    ("recipe", "why"),
    [
        (
            {"kv_cache": {"num_bits": 4}},
            r"^keys and values are quantized, .* quantize with no table `kv_cache`, or measure the artifact itself",
        ),
        ({"prefix": {"tokens": [1]}}, r"^a prefix of tokens stands in front .* quantize with no `prefix`, or measure"),
    ],
)
def test_what_a_checkpoint_has_no_place_for_is_refused(recipe, why, small_run, one_layer, tmp_path):
    artifact = small_run(one_layer, "W4A8", recipe=RTN | recipe)
    with pytest.raises(UsageError, match=why):
        export_artifact(artifact.directory, TARGET, tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_a_module_of_a_strange_kind_is_refused(artifact_rtn):
    outline = Outline.read(artifact_rtn.directory)
    EXPORTERS[TARGET].check(outline)
    outline.skeleton.set_submodule(UP, nn.Embedding(172, 64, device="meta"))
    with pytest.raises(UsageError, match=rf"^{UP} is a Embedding, of which .*; quantize with --ignore {UP}$"):
        EXPORTERS[TARGET].check(replace(outline))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_checkpoint_that_computes_something_else_is_noticed(dtype, one_layer, small_run, tmp_path, monkeypatch):
    """A transform that is left out, also behind the wider tolerance of bfloat16."""
    shutil.copytree(one_layer, tmp_path / "model")
    tensors = {name: x.to(getattr(torch, dtype)) for name, x in load_file(one_layer / "model.safetensors").items()}
    save_file(tensors, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    change_json(tmp_path / "model" / "config.json", dtype=dtype)
    artifact = small_run(
        tmp_path / "model", "W4A4", recipe={"quantizer": {"name": "rtn"}, "passes": [{"name": "rotate"}]}
    )
    monkeypatch.setattr(export, "float_linear", lambda linear: (linear.qtensor().dequantize(), linear.bias))
    with pytest.raises(
        QuantizeError, match=r"transformers differs from the artifact by .* and rounding explains at most"
    ):
        export_artifact(artifact.directory, TARGET, tmp_path / "no")
    monkeypatch.undo()
    monkeypatch.setattr(export, "as_json", lambda config: json.dumps(config | {"hidden_act": "no_such"}))
    with pytest.raises(QuantizeError, match="transformers cannot load the checkpoint"):
        export_artifact(artifact.directory, TARGET, tmp_path / "no")
    assert not (tmp_path / "no").exists()
