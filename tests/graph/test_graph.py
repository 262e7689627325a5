"""The exported graph, and what the analysis finds in it, edge by edge."""

import io
from itertools import pairwise

import torch
import transformers
from helpers.soundness import make_case, violations
from rich.console import Console
from torch import nn

from quantize.eval.bases_table import bases_table
from quantize.graph.allowed_transforms import AllowedTransforms
from quantize.graph.analysis import admissible_bases, find_bases
from quantize.graph.export import export_program
from quantize.graph.interpreter import Overrides, run_nodes, start
from quantize.transforms import equivalence

LLAMA = transformers.LlamaConfig(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
    vocab_size=50, tie_word_embeddings=True, max_position_embeddings=64,
)  # fmt: skip


def by_writer(bases, name):
    return next(b for b in bases if any(e.parameter.endswith(name) for e in b.writers))


def test_the_sites_of_llama():
    bases = admissible_bases(export_program(transformers.LlamaForCausalLM(LLAMA)))
    residual = by_writer(bases, "embed_tokens.weight")
    assert (residual.dim, residual.allowed, len(residual.gains)) == (32, AllowedTransforms.ORTHOGONAL, 5)
    assert len(residual.writers) == 1 + 2 * 2
    assert len(residual.readers) == 2 * 5 + 1
    values = by_writer(bases, "layers.0.self_attn.v_proj.weight")
    assert (values.dim, values.heads, values.allowed) == (16, 2, AllowedTransforms.LINEAR)
    assert values.readers[0].index.tolist() == [[*range(8), *range(16, 24)], [*range(8, 16), *range(24, 32)]]  # GQA
    smooth = by_writer(bases, "layers.1.post_attention_layernorm.weight")
    assert smooth.allowed == AllowedTransforms.DIAGONAL
    assert [e.parameter.split(".")[-2] for e in smooth.readers] == ["gate_proj", "up_proj"]
    assert by_writer(bases, "layers.0.mlp.up_proj.weight").allowed == AllowedTransforms.DIAGONAL
    assert "silu" in " ".join(by_writer(bases, "layers.0.mlp.gate_proj.weight").pins)
    queries = by_writer(bases, "layers.0.self_attn.q_proj.weight")  # pairs of channels are rotated by positions
    assert (queries.dim, queries.allowed) == (2 * 4, AllowedTransforms.DIAGONAL)
    assert queries.writers[0].index.tolist() == [
        [*range(0, 4), *range(16, 20)], [*range(4, 8), *range(20, 24)],
        [*range(8, 12), *range(24, 28)], [*range(12, 16), *range(28, 32)],
    ]  # fmt: skip
    keys = queries.readers[0]
    assert (keys.parameter, keys.axis, keys.dual) == ("model.layers.0.self_attn.k_proj.weight", 0, True)
    assert keys.index.tolist() == [[*range(0, 4), *range(8, 12)], [*range(4, 8), *range(12, 16)]]


def test_fused_projections_fall_apart_into_ranges():
    """Query, key and value in one matrix: queries go with keys, values with what reads them."""

    class Fused(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.qkv, self.out = nn.Embedding(50, 16), nn.Linear(16, 48), nn.Linear(16, 16)

        def forward(self, ids):
            q, k, v = self.qkv(self.table(ids)).view(*ids.shape, 3, 2, 8).permute(2, 0, 3, 1, 4).unbind(0)
            mixed = nn.functional.scaled_dot_product_attention(q, k, v)
            return self.out(mixed.transpose(1, 2).reshape(*ids.shape, 16))

    case = make_case(Fused())
    bases = find_bases(case.program)
    assert not violations(case, bases)
    queries, values = (b for b in bases.all if b.allowed == AllowedTransforms.LINEAR and b.heads == 2)
    assert values.writers[0].index.tolist() == [list(range(32, 48))]
    assert values.readers[0].parameter == "out.weight"
    assert queries.writers[0].index.tolist() == [list(range(16))]
    assert [(e.parameter, e.dual, e.index.tolist()) for e in queries.readers] == [
        ("qkv.weight", True, [list(range(16, 32))]), ("qkv.bias", True, [list(range(16, 32))])
    ]  # fmt: skip


def test_blocks_are_cut_where_the_module_list_is():
    program = export_program(transformers.LlamaForCausalLM(LLAMA))
    assert [s.name for s in program.segments] == ["head", "model.layers.0", "model.layers.1", "tail"]
    assert program.segments[1].parameters[0] == "model.layers.0.input_layernorm.weight"
    assert program.vocabulary == 50


def test_the_program_computes_what_the_model_computes():
    model = transformers.LlamaForCausalLM(LLAMA).eval()
    weights = {name: p.detach().clone() for name, p in model.named_parameters(remove_duplicate=False)}
    ids = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6, 5]])
    with torch.no_grad():
        expected = model(ids).logits.flatten()
    program = export_program(transformers.LlamaForCausalLM(LLAMA))
    values = start(program, ids)
    for segment in program.segments:
        run_nodes(program, segment.nodes, values, Overrides(weights))
    assert equivalence.relative(values[program.output.all_input_nodes[0]].flatten(), expected) < 1e-5


def test_bases_that_are_alike_in_every_layer_are_one_row():
    bases = [b.as_dict() for b in admissible_bases(export_program(transformers.LlamaForCausalLM(LLAMA)))]
    table = bases_table(bases)
    rows = list(zip(*(column.cells for column in table.columns), strict=True))
    heads = [n for n, row in enumerate(rows) if row[0].startswith("[bold]")]
    found = [dict(rows[start:end]) | {"all": rows[start]} for start, end in pairwise([*heads, len(rows)])]
    assert sum(int(each["all"][0].split()[0].removeprefix("[bold]")) for each in found) == len(bases) > len(found)
    gain = next(each for each in found if each.get("written by") == "model.layers.{i}.post_attention_layernorm")
    assert gain["all"] == ("[bold]2 bases", "[bold]32 channels, diagonal")
    assert gain["read by"].split("\n") == ["model.layers.{i}.mlp.gate_proj", "model.layers.{i}.mlp.up_proj"]
    assert "sits between it and what writes it" in gain["why no more"]
    residual = next(each for each in found if each.get("written by", "").startswith("model.embed_tokens"))
    assert "only once `model.layers.{i}.input_layernorm.weight` is folded" in residual["why no more"].split("\n")
    queries = next(each for each in found if each.get("written by") == "model.layers.{i}.self_attn.q_proj")
    assert queries["read by"] == "↔ model.layers.{i}.self_attn.k_proj"


def test_no_name_is_broken_at_80_columns():
    names = [f"model.language_model.layers.7.self_attn.{x}_proj.weight" for x in "qkv"]
    basis = {"dim": 64, "allowed": "orthogonal", "heads": 1, "pins": ["`x.weight` is read by something " * 3]}
    basis |= {"writers": names, "readers": [], "paired": names, "after_folding": []}
    console = Console(width=80, file=io.StringIO())
    console.print(bases_table([basis]))
    shown = console.file.getvalue()
    assert max(map(len, shown.splitlines())) <= 80
    assert all(f"model.language_model.layers.{{i}}.self_attn.{x}_proj" in shown for x in "qkv")
