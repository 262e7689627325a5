"""Checkpoints that are quantized already give the floats that transformers makes of them, bit for bit."""

from __future__ import annotations

import json
import sys

import pytest
import torch
import transformers
from helpers import quantized_sources
from helpers.quantized_sources import is_linear, rewrite, tensors_of

from quantize.checkpoint.opening import open_checkpoint
from quantize.checkpoint.sources.encoded import unpack_bits
from quantize.errors import QuantizeError, UsageError

GROUPS = {"num_bits": 4, "type": "int", "strategy": "group"}
COMPRESSED = [
    ("pack-quantized", {**GROUPS, "symmetric": True, "group_size": 32}),
    ("pack-quantized", {**GROUPS, "symmetric": False, "group_size": 16}),
    ("pack-quantized", {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}),
    ("int-quantized", {"num_bits": 8, "type": "int", "symmetric": False, "strategy": "channel"}),
    ("float-quantized", {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"}),
    ("float-quantized", {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor"}),
    ("nvfp4-pack-quantized", {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}),
    ("mxfp4-pack-quantized", {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32}),
]


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
def require_equal(directory, config=None):
    """The tensors of a directory are those of `from_pretrained` with dequantizing, in its dtype and bits."""
    reference = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.bfloat16, **({"quantization_config": config} if config else {})
    )
    checkpoint = open_checkpoint(directory)
    for name, expected in reference.named_parameters():
        found = checkpoint.tensor(name)
        assert found.dtype == expected.dtype == checkpoint.dtype_of(name)
        assert torch.equal(found, expected), name
    assert "quantization_config" not in checkpoint.config


@pytest.mark.parametrize(
    ("block", "dtype"),
    [((32, 32), torch.float32), ((16, 32), torch.bfloat16), ((32, 32), torch.float8_e8m0fnu)],
)
def test_fp8_in_blocks(tmp_path, block, dtype):
    directory = quantized_sources.fp8(tmp_path, block, dtype)
    require_equal(directory, transformers.FineGrainedFP8Config(dequantize=True, weight_block_size=block))


def test_experts_in_fp8_are_stacked(tmp_path):
    directory = quantized_sources.fp8(tmp_path, (16, 32), family="qwen3_moe")
    assert any(".experts.0.gate_proj.weight" in name for name in tensors_of(directory))
    require_equal(directory, transformers.FineGrainedFP8Config(dequantize=True, weight_block_size=(16, 32)))


def test_blocks_may_be_cut_off_at_the_edges(tmp_path):
    found = open_checkpoint(quantized_sources.fp8(tmp_path, (40, 56)))
    name = "model.layers.0.mlp.gate_proj.weight"
    tensors = tensors_of(tmp_path)
    W, scale = tensors[name].float(), tensors[f"{name}_scale_inv"]
    assert scale.shape == (3, 2)  # of 96 x 64
    assert found.float_tensor(name)[95, 63] == W[95, 63] * scale[2, 1]
    assert found.float_tensor(name)[79, 55] == W[79, 55] * scale[1, 0]


@pytest.mark.parametrize(("format", "weights"), COMPRESSED)
@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
def test_compressed_tensors(tmp_path, format, weights):
    directory = quantized_sources.compressed(tmp_path, format, **weights)
    require_equal(directory, transformers.CompressedTensorsConfig(dequantize=True))


def test_columns_in_the_order_of_their_activations(tmp_path):
    """compressed-tensors has given up `g_idx`, and files have it."""
    quantized_sources.compressed(tmp_path, "pack-quantized", **{**GROUPS, "group_size": 32})
    name, tensors = "model.layers.0.mlp.up_proj.weight", tensors_of(tmp_path)
    before = open_checkpoint(tmp_path).float_tensor(name)
    order = torch.arange(64).flip(0)
    settings = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    q = unpack_bits(tensors[f"{name}_packed"], 4, 1)[:, order]
    tensors[f"{name}_packed"] = quantized_sources.pack_rows(q, 4)
    tensors[f"{name}_g_idx"] = (torch.arange(64) // 32)[order].to(torch.int32)
    rewrite(tmp_path, tensors, settings)
    assert torch.equal(open_checkpoint(tmp_path).float_tensor(name), before[:, order])


def test_experts_in_mxfp4(tmp_path):
    directory = quantized_sources.mxfp4_experts(tmp_path)
    require_equal(directory, transformers.Mxfp4Config(dequantize=True))


@pytest.mark.parametrize(
    ("bits", "group", "act_order", "version"),
    [(4, 32, False, "gptq"), (4, 16, True, "gptq"), (8, 32, False, "gptq_v2")],
)
def test_gptq(tmp_path, bits, group, act_order, version):
    """The reference takes the format's definition literally, number by number."""
    checkpoint = open_checkpoint(quantized_sources.gptq(tmp_path, bits, group, act_order, version))
    path, tensors, each = "model.layers.1.self_attn.k_proj", tensors_of(tmp_path), 32 // bits
    qweight, qzeros, scales, g_idx = (tensors[f"{path}.{x}"] for x in ("qweight", "qzeros", "scales", "g_idx"))
    found = checkpoint.float_tensor(f"{path}.weight")
    for n, k in ((0, 0), (31, 63), (5, 17), (20, 40)):
        g, mask = int(g_idx[k]), (1 << bits) - 1
        q = (int(qweight[k // each, n]) >> (bits * (k % each))) & mask
        zero = ((int(qzeros[g, n // each]) >> (bits * (n % each))) & mask) + (version == "gptq")
        assert float(found[n, k]) == (q - zero) * float(scales[g, n])
    assert checkpoint.tensor(f"{path}.weight").dtype == torch.float16


def test_awq(tmp_path):
    """The reference is the converter of compressed-tensors."""
    from compressed_tensors.entrypoints.convert.converters import AutoAWQConverter

    checkpoint = open_checkpoint(quantized_sources.awq(tmp_path))
    path, tensors = "model.layers.1.mlp.down_proj", tensors_of(tmp_path)
    converter = AutoAWQConverter(bits=4, group_size=32)
    q, scale, zero_point = converter._convert_gemm_module(
        *(tensors[f"{path}.{x}"] for x in ("qweight", "scales", "qzeros"))
    )
    expected = (q.unflatten(1, (-1, 32)).float() - zero_point[..., None].float()) * scale[..., None].float()
    assert torch.equal(checkpoint.float_tensor(f"{path}.weight"), expected.flatten(1))


def test_modelopt(tmp_path):
    """Its NVFP4 is that of compressed-tensors with the reciprocal of the global scale."""
    settings = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
    quantized_sources.compressed(tmp_path / "a", "nvfp4-pack-quantized", **settings)
    one, other = open_checkpoint(tmp_path / "a"), open_checkpoint(quantized_sources.modelopt(tmp_path / "b"))
    for name in filter(is_linear, one.sources):
        torch.testing.assert_close(other.float_tensor(name), one.float_tensor(name), rtol=1e-6, atol=0)
    assert one.encoded.keys() == other.encoded.keys()


def test_settings_beside_the_config_and_in_a_part_of_it(tmp_path):
    quantized_sources.modelopt(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({k: x for k, x in config.items() if k != "quantization_config"}))
    (tmp_path / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": "NVFP4"}}))
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.encoded
    assert not [path for path in checkpoint.side_files if path.name == "hf_quant_config.json"]


def test_gguf(tmp_path):
    """One file beside its config, in blocks of several kinds; `from_pretrained` reads the same floats."""
    path = quantized_sources.gguf_file(tmp_path)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    reference = transformers.LlamaForCausalLM.from_pretrained(
        tmp_path, gguf_file=path.name, dtype=torch.float32, config=config
    )
    checkpoint = open_checkpoint(path)
    for name, expected in reference.named_parameters():
        assert torch.equal(checkpoint.tensor(name), expected), name
    assert checkpoint.stored_bytes() == path.stat().st_size


def cut(path):
    path.write_bytes(path.read_bytes()[:-1000])


def no_config(path):
    path.with_name("config.json").unlink()


@pytest.mark.parametrize(
    ("damage", "error", "words"),
    [
        (cut, QuantizeError, "model.gguf is truncated"),
        (lambda path: path.write_bytes(b"GGUX" * 9), QuantizeError, "model.gguf is truncated or no GGUF file"),
        (no_config, UsageError, "is a GGUF file, and no config.json lies beside it"),
    ],
)
def test_a_gguf_file_that_cannot_be_read(tmp_path, damage, error, words):
    path = quantized_sources.gguf_file(tmp_path)
    damage(path)
    with pytest.raises(error) as caught:
        open_checkpoint(path)
    assert words in str(caught.value)


def test_gguf_without_its_package(tmp_path, monkeypatch):
    path = quantized_sources.gguf_file(tmp_path)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UsageError, match="is read by the package gguf: pip install"):
        open_checkpoint(path)


def without(directory, end):
    tensors = tensors_of(directory)
    del tensors[next(name for name in sorted(tensors) if name.endswith(end))]
    return tensors


def changed(directory, end, change):
    tensors = tensors_of(directory)
    name = next(name for name in sorted(tensors) if name.endswith(end))
    return tensors | {name: change(tensors[name])}


DOWN = "model.layers.0.mlp.down_proj.weight"


@pytest.mark.parametrize(
    ("make", "damage", "words"),
    [
        (quantized_sources.fp8, lambda d: without(d, "_scale_inv"), f"{DOWN}_scale_inv is missing; fetch"),
        (quantized_sources.fp8, lambda d: changed(d, "_scale_inv", lambda x: x * float("nan")),
         f"{DOWN}_scale_inv holds nan at [0, 0]"),
        (quantized_sources.fp8, lambda d: changed(d, "_scale_inv", lambda x: x[:, 1:].clone()),
         f"{DOWN} of the shape [64, 96] cannot have scales of [2, 2]; blocks of 32 x 32 need [2, 3]"),
        (quantized_sources.mxfp4_experts, lambda d: changed(d, "_scales", lambda x: x[:, :1].clone()),
         "model.layers.0.mlp.experts.down_proj has blocks of"),
        (quantized_sources.mxfp4_experts, lambda d: changed(d, "_scales", lambda x: torch.full_like(x, 255)),
         "model.layers.0.mlp.experts.down_proj_scales holds nan at"),
        (quantized_sources.gptq, lambda d: without(d, ".qzeros"), "model.layers.0.mlp.down_proj.qzeros is missing"),
        (quantized_sources.gptq, lambda d: changed(d, ".g_idx", lambda x: x + 3), f"{DOWN} has integers of [96, 64]"),
        (quantized_sources.awq, lambda d: changed(d, ".scales", lambda x: x[:, 8:].clone()), f"{DOWN} has integers of"),
        (quantized_sources.modelopt, lambda d: without(d, "_scale_2"), f"{DOWN}_scale_2 is missing"),
    ],
)  # fmt: skip
def test_a_source_that_does_not_fit_its_format(tmp_path, make, damage, words):
    make(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    rewrite(tmp_path, damage(tmp_path), settings)
    with pytest.raises(QuantizeError) as caught:
        checkpoint = open_checkpoint(tmp_path)
        for name in checkpoint.sources:
            checkpoint.tensor(name)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"quant_method": "hqq"}, UsageError, "is quantized already, by 'hqq', which cannot be read; known are awq, "),
        ({"quant_method": "quantize-model"}, UsageError, "is an artifact of quantize-model; write it in"),
        ("no table", UsageError, "is quantized already, by None"),
        ({"quant_method": "fp8", "weight_block_size": [0, 128]}, QuantizeError, "weight_block_size is [0, 128]"),
        ({"quant_method": "gptq", "bits": 4}, UsageError, "is quantized by gptq, says its config, but its files hold"),
    ],
)
def test_a_config_that_cannot_be_followed(tmp_path, settings, error, words):
    directory = quantized_sources.small_llama(tmp_path)
    rewrite(directory, tensors_of(directory), settings)
    with pytest.raises(error) as caught:
        open_checkpoint(directory)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("make", "settings", "error", "words"),
    [
        (
            quantized_sources.gptq,
            {"bits": 3},
            UsageError,
            "the GPTQ weights have 3 bits; weights of 2, 4, 8 can be read",
        ),
        (quantized_sources.awq, {"version": "gemv"}, UsageError, "the layout 'gemv'; 4 and gemm can be read"),
        (quantized_sources.fp8, {"weight_block_size": [64, 64]}, QuantizeError, "blocks of 64 x 64 need [1, 1]"),
    ],
)
def test_settings_that_the_files_do_not_have(tmp_path, make, settings, error, words):
    directory = make(tmp_path)
    given = json.loads((directory / "config.json").read_text())["quantization_config"]
    rewrite(directory, tensors_of(directory), given | settings)
    with pytest.raises(error) as caught:
        open_checkpoint(directory).tensor("model.layers.0.self_attn.k_proj.weight")
    assert words in str(caught.value)
