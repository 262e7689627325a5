"""Tables of words and the linear that scores the vocabulary in 8 bits: where, what is stored, and what can be said."""

from __future__ import annotations

import json
import shutil
import tomllib

import onnx
import pytest
import torch
from helpers.exporting import nodes
from helpers.json_files import change_json
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import BartConfig, BartForConditionalGeneration, Gemma3ForCausalLM, Gemma3TextConfig

from quantize.artifact.load import load
from quantize.artifact.verify import verify_artifact
from quantize.checkpoint.opening import open_checkpoint
from quantize.errors import QuantizeError, UsageError
from quantize.export.directory import export_artifact
from quantize.export.onnx.precision import CAST
from quantize.graph.export import export_program
from quantize.graph.usage_probe import looks_up
from quantize.nn.quantized_embedding import QuantizedEmbedding, quantize_embedding
from quantize.pipeline.plan import make_plan
from quantize.quantizers.rtn import RoundToNearest
from quantize.recipe.recipe import load_recipe
from quantize.scheme.scheme import SCHEME_NAMES, TABLE_SCHEME

TABLE, HEAD = "model.embed_tokens", "lm_head"
SCALES = 0.2  # of the bytes of the integers: scales and zero points of small models in float32, with file headers


def all_tensors(directory):
    return {name: x for path in directory.glob("model-*.safetensors") for name, x in load_file(path).items()}


@pytest.fixture(scope="module")
def untied(one_layer, tmp_path_factory):
    """The one layer with a head of its own."""
    directory = tmp_path_factory.mktemp("untied") / "model"
    shutil.copytree(one_layer, directory)
    change_json(directory / "config.json", tie_word_embeddings=False)
    weights = load_file(directory / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].flip(1) + 0.01
    save_file(weights, directory / "model.safetensors", {"format": "pt"})
    return directory


@pytest.fixture(scope="module")
def graphs(one_layer, untied):
    return {name: export_program(open_checkpoint(x).skeleton()) for name, x in (("tied", one_layer), ("not", untied))}


def held(program, scheme="W4A16", **changes):
    """What is held in 8 bits: the tables and the head; and the plan."""
    plan = make_plan(load_recipe(scheme, changes, group_size=0), program)
    return list(plan.recipe.tables), plan


@pytest.mark.parametrize("scheme", ["W8A8", "W6A6", "W4A16", "W4A8", "W4A4"])
def test_both_are_held_in_8_bits_where_they_are_not_one_tensor(graphs, scheme):
    rotated = scheme not in ("W8A8", "W4A16", "W4A4")
    assert held(graphs["tied"], scheme)[0] == ([TABLE, HEAD] if rotated else [])
    tables, plan = held(graphs["not"], scheme)
    assert (tables, plan.tables, plan.recipe.ignore) == ([TABLE, HEAD], (f"{TABLE}.weight",), ())
    assert plan.schemes[HEAD].label == "W8A16"
    assert f"{HEAD}.weight" not in plan.skipped and f"{TABLE}.weight" not in plan.skipped


def test_what_the_recipe_says_wins(graphs):
    program = graphs["not"]
    assert held(program, tables=[])[0] == []
    assert held(program, tables=[])[1].recipe.ignore == (HEAD,)
    assert held(program, tables=["embed_tokens"])[0] == [TABLE]
    assert held(graphs["tied"], tables=["re:.*"])[0] == [TABLE, HEAD]
    assert held(program, ignore_also=[HEAD])[0] == [TABLE]
    assert held(program, ignore_also=["embed_tokens"])[0] == [HEAD]
    assert held(program, targets=["re:.*_proj", HEAD])[0] == [HEAD]
    assert held(program, layers=[{"match": HEAD, "ignore": True}])[0] == [TABLE]
    own = held(program, layers=[{"match": HEAD, "scheme": "W8A8"}])
    assert (own[0], own[1].schemes[HEAD].label) == ([TABLE], "W8A8")


def test_a_list_of_what_to_ignore_gives_the_head_the_scheme_of_all_linears(graphs):
    tables, plan = held(graphs["tied"], "W4A16", ignore=["q_proj"])
    assert (tables, plan.schemes[HEAD].label) == ([TABLE], "W4A16")  # the table is no longer tied to it


def test_a_pattern_that_matches_no_table_is_refused(graphs):
    with pytest.raises(UsageError, match=r"tables: 'q_proj' matches no table of words or linear that scores the voc"):
        held(graphs["not"], tables=["q_proj"])


def test_a_resolved_recipe_decides_the_same(graphs):
    for name, program in graphs.items():
        for scheme in ("W4A8", "W4A16"):
            tables, plan = held(program, scheme, ignore_also=["embed_tokens"] if name == "not" else [])
            again = make_plan(load_recipe(None, tomllib.loads(plan.recipe.to_toml())), program)
            assert (again.recipe, again.schemes, again.tables) == (plan.recipe, plan.schemes, plan.tables)
            assert list(again.recipe.tables) == tables


def test_both_are_rounded_to_nearest_by_row(small_run, untied):
    """Whatever the quantizer is, and after passes have changed them."""
    artifact = small_run(untied, "W4A16")
    stored, weights = all_tensors(artifact.directory), load_file(untied / "model.safetensors")
    for path in (TABLE, HEAD):
        W = weights[f"{path}.weight"]
        expected = RoundToNearest().quantize(W.float(), TABLE_SCHEME.weights, None, W.dtype)
        assert torch.equal(stored[f"{path}.qweight"], expected.data)
        assert torch.equal(stored[f"{path}.scale"], expected.scale)
    model = load(artifact.directory)
    assert type(model.model.embed_tokens) is QuantizedEmbedding
    table = stored[f"{TABLE}.qweight"] * stored[f"{TABLE}.scale"]
    ids = torch.tensor([[3, 0, 511]])
    assert torch.equal(model.model.embed_tokens(ids), table[ids])
    assert (table - weights[f"{TABLE}.weight"]).abs().max() < 0.01 * table.abs().max()
    assert verify_artifact(artifact.directory)["difference"] < 1e-5


def test_tuning_leaves_the_head_as_it_was_rounded(small_run, untied):
    recipe = {"tune": {"steps": 20, "learning_rate": 0.02}, "quantizer": {"name": "rtn"}}
    tuned, plain = small_run(untied, "W4A16", recipe=recipe), small_run(untied, "W4A16", "plain")
    first, second = all_tensors(tuned.directory), all_tensors(plain.directory)
    assert torch.equal(first[f"{HEAD}.qweight"], second[f"{HEAD}.qweight"])
    assert not torch.equal(first["model.layers.0.mlp.up_proj.qweight"], second["model.layers.0.mlp.up_proj.qweight"])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tied", "untied"])
@pytest.mark.parametrize("scheme", SCHEME_NAMES)
def test_no_default_is_larger_than_linears_at_their_bits_and_tables_in_8_bits(
    small_run, one_layer, untied, scheme, kind
):
    """Tied tables that stay tied have 16 bits for both, as two tables of 8 bits have."""
    model = one_layer if kind == "tied" else untied
    fp4 = {"ignore_also": ["down_proj"]} if "FP4" in scheme else {}  # whose 172 columns no group divides
    settings = {"group_size": None} if fp4 else {}
    artifact = small_run(model, scheme, recipe=fp4, **settings)
    weights = load_file(model / "model.safetensors")
    size = sum(path.stat().st_size for path in artifact.directory.glob("model-*.safetensors"))
    bits = {"W8A8": 8, "W8A16": 8, "W6A6": 8}.get(scheme, 4)
    linears = sum(
        x.numel() * (32 if fp4 and "down_proj" in name else bits) for name, x in weights.items() if "proj" in name
    )
    tables = 2 * 8 * weights[f"{TABLE}.weight"].numel()
    if kind == "tied" and not artifact.manifest["untied"]:
        tables *= 2  # this model is stored in float32, not in 16 bits
    assert size < (1 + SCALES) * (linears + tables) / 8


def test_a_table_that_is_read_in_other_ways_stays():
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.linear, self.head = nn.Embedding(512, 16), nn.Linear(16, 16), nn.Linear(16, 512)

        def forward(self, input_ids):
            return self.head(self.linear(self.embed(input_ids))) + self.embed.weight.sum()

    program = export_program(Reads())
    assert program.vocabulary == 512
    assert held(program)[0] == ["head"]


def test_classes_that_do_more_to_the_rows_are_told_from_those_that_read_the_table():
    class Scaled(nn.Embedding):
        def forward(self, ids):
            return super().forward(ids) * 3.0

    class Own(nn.Embedding):
        def forward(self, ids):
            return nn.functional.embedding(ids, self.weight)

    kinds = [nn.Embedding, Scaled, Own]
    assert [looks_up(kind(4, 8, device="meta")) for kind in kinds] == [True, True, False]
    assert not looks_up(nn.Linear(4, 8, device="meta"))


def test_rows_are_scaled_as_the_class_does(small_run, tmp_path):
    """Gemma scales the rows that it looks up."""
    torch.manual_seed(0)
    sizes = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "intermediate_size": 48}
    config = Gemma3TextConfig(vocab_size=512, hidden_size=32, num_hidden_layers=1, tie_word_embeddings=False, **sizes)
    model = Gemma3ForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "model")
    artifact = small_run(tmp_path / "model", "W4A8")
    loaded, ids = load(artifact.directory), torch.arange(12)[None]
    embed = loaded.model.embed_tokens
    table = embed.qweight * embed.scale
    torch.testing.assert_close(embed(ids), table[ids] * 32**0.5)
    assert embed.weight.shape == (512, 32) and embed.weight.device.type == "cpu"
    before = embed(ids)
    embed.dequantize(torch.float32)
    assert type(embed) is type(model.model.embed_tokens)
    torch.testing.assert_close(embed(ids), before)


def test_copies_that_nothing_reads_are_held_in_8_bits_too(small_run, tmp_path, monkeypatch):
    """BART's `shared` is tied to the tables of encoder and decoder, which look up in their own.

    The head is untied from them by a gain that is folded into it, here although no rotation is freed.
    """
    monkeypatch.setattr("quantize.pipeline.plan.freeing", lambda sites, *_: tuple(sites))
    torch.manual_seed(0)
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    layers = {"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    model = BartForConditionalGeneration(BartConfig(vocab_size=512, d_model=32, **heads, **layers)).eval()
    rows = torch.randint(500, (2, 16))
    save_file({"input_ids": rows, "decoder_input_ids": rows + 1}, tmp_path / "rows.safetensors")
    artifact = small_run(model, "W4A8", calibration=tmp_path / "rows.safetensors")
    tables = ["model.encoder.embed_tokens", "model.decoder.embed_tokens", "model.shared"]
    assert artifact.manifest["quantization"]["tables"] == tables
    stored = all_tensors(artifact.directory)
    assert {stored[f"{path}.qweight"].dtype for path in (*tables, HEAD)} == {torch.int8}
    assert not any(x.is_floating_point() and x.shape == (512, 32) for x in stored.values())
    assert verify_artifact(artifact.directory)["difference"] < 1e-5


def test_exports_of_a_table_and_a_head_in_8_bits(small_run, untied, tmp_path):
    artifact = small_run(untied, "W4A16")
    parity = {
        kind: export_artifact(artifact.directory, kind, tmp_path / kind)
        for kind in ("onnx", "compressed-tensors", "safetensors-float")
    }
    assert parity["onnx"]["emulation"] < 1e-5
    assert parity["onnx"]["activations"] == 0
    file = onnx.load(tmp_path / "onnx" / "model.onnx").graph
    kinds = {tuple(x.dims): x.data_type for x in file.initializer if 512 in x.dims and 64 in x.dims}
    assert kinds == dict.fromkeys([(512, 64), (64, 512)], onnx.TensorProto.INT8)
    assert len(nodes(tmp_path / "onnx" / "model.onnx", "Gather")) >= 2
    assert json.loads((tmp_path / "onnx" / "ort_config.json").read_text())["precisions"][CAST] == 1
    for kind in ("compressed-tensors", "safetensors-float"):
        stored = {n: x for path in (tmp_path / kind).glob("*.safetensors") for n, x in load_file(path).items()}
        held = all_tensors(artifact.directory)
        for path in (TABLE, HEAD):
            expected = held[f"{path}.qweight"] * held[f"{path}.scale"]
            torch.testing.assert_close(stored[f"{path}.weight"], expected, check_dtype=False)


def test_a_damaged_table_is_refused():
    q, scale = torch.zeros(4, 8, dtype=torch.int8), torch.ones(4, 1)
    with pytest.raises(QuantizeError, match="words holds no table of 4 rows and 8 columns"):
        quantize_embedding(nn.Embedding(4, 6), q, scale, "words")
    with pytest.raises(QuantizeError, match="words holds no table of 4 rows"):
        quantize_embedding(nn.Linear(4, 8), q, scale, "words")
    with pytest.raises(QuantizeError, match="the scale of words are"):
        quantize_embedding(nn.Embedding(4, 8), q, torch.ones(4), "words")
    with pytest.raises(QuantizeError, match="the integers of words are"):
        quantize_embedding(nn.Embedding(4, 8), q.float(), scale, "words")


def test_an_artifact_without_its_table_is_refused(small_run, untied):
    artifact = small_run(untied, "W4A16")
    for path in artifact.directory.glob("model-*.safetensors"):
        weights = load_file(path)
        if weights.pop(f"{TABLE}.scale", None) is not None:
            save_file(weights, path, {"format": "pt"})
    with pytest.raises(QuantizeError, match=r"lists model\.embed_tokens as a table in 8 bits but holds no model"):
        load(artifact.directory)
