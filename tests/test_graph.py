"""Where a transform is legal: found by the analysis, proved by number."""

import pytest
import torch
import transformers
from torch import nn

from quantize import gate
from quantize.fold import Diagonal, Rotation, fold
from quantize.graph.basis import admissible_bases, find_bases
from quantize.graph.execute import State, advance, start
from quantize.graph.group import Group
from quantize.graph.program import export_program

LLAMA = transformers.LlamaConfig(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
    vocab_size=50, tie_word_embeddings=True, max_position_embeddings=64,
)  # fmt: skip
BERT = transformers.BertConfig(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    vocab_size=50,
    max_position_embeddings=64,
)
FAMILIES = {"llama": (transformers.LlamaForCausalLM, LLAMA), "bert": (transformers.BertModel, BERT)}


class Toy(nn.Module):
    """Not from any library: a ReLU block on a residual stream, and an operator nobody wrote a rule for."""

    def __init__(self, odd=False):
        super().__init__()
        self.table = nn.Embedding(50, 12)
        self.up, self.down, self.head = nn.Linear(12, 20), nn.Linear(20, 12), nn.Linear(12, 50)
        self.odd = odd

    def forward(self, ids):
        x = self.table(ids)
        if self.odd:
            x = torch.flip(x, dims=[-1])
        return self.head(x + self.down(torch.relu(self.up(x))))


def build(model):
    """A program with random weights, gains and biases away from one and zero."""
    rng = torch.Generator().manual_seed(0)
    program = export_program(model.to("meta") if isinstance(model, Toy) else model)
    shapes = {name: node.meta["val"].shape for node, name in program.parameters.items()}
    weights = {name: torch.randn(shape, generator=rng) * shape[-1] ** -0.5 for name, shape in shapes.items()}
    return program, {name: w + 1 if w.dim() == 1 and "norm" in name.lower() else w for name, w in weights.items()}


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def family(request):
    cls, config = FAMILIES[request.param]
    return build(cls(config))


def outputs(program, weights):
    values = start(program, torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6, 5]]))
    for segment in program.segments:
        advance(program, segment.nodes, values, State(weights))
    return torch.cat([values[node].flatten() for node in program.output.all_input_nodes])


def random_transform(basis, group):
    rng = torch.Generator().manual_seed(basis.index)
    if group is Group.ORTHOGONAL:
        return Rotation(torch.randint(0, 2, (basis.dim,), generator=rng).double() * 2 - 1, basis.dim // basis.heads)
    signs = torch.randint(0, 2, (basis.dim,), generator=rng) * 2 - 1 if group is Group.DIAGONAL else 1
    return Diagonal(signs * (torch.rand(basis.dim, generator=rng, dtype=torch.float64) + 0.5))


def with_unit_gains(program, weights):
    """The weights with every foldable gain folded, and the analysis that holds for them."""
    gains = frozenset(gain for basis in admissible_bases(program) for gain in basis.gains)
    for basis in find_bases(program).all:
        if basis.writers and basis.writers[0].parameter in gains:
            weights = weights | fold(basis, Diagonal(1 / weights[basis.writers[0].parameter].double()), weights)
    return weights, find_bases(program, gains)


def test_every_admissible_transform_preserves_the_function(family):
    program, weights = family
    expected, tried = outputs(program, weights), []
    for unit, bases in ((weights, find_bases(program)), with_unit_gains(program, weights)):
        for basis in (b for b in bases.all if b.writers and b.readers):
            for group in (Group.ORTHOGONAL, Group.DIAGONAL, Group.POSITIVE_DIAGONAL):
                if group in basis.group:
                    found = outputs(program, unit | fold(basis, random_transform(basis, group), unit))
                    assert gate.relative(found, expected) < 1e-5, (gate.describe(basis), group)
                    tried.append(group)
    assert tried.count(Group.ORTHOGONAL) >= 2
    assert tried.count(Group.DIAGONAL) >= 2


def test_a_pinned_basis_is_pinned_for_a_reason(family):
    program, weights = family
    expected, tried = outputs(program, weights), 0
    for basis in (b for b in find_bases(program).all if b.group is Group.NONE and b.writers and b.readers):
        found = outputs(program, weights | fold(basis, random_transform(basis, Group.DIAGONAL), weights))
        assert gate.relative(found, expected) > 1e-3, gate.describe(basis)
        assert basis.pins
        tried += 1
    assert tried >= 1


def by_writer(bases, name):
    return next(b for b in bases if any(e.parameter.endswith(name) for e in b.writers))


def test_the_sites_of_llama():
    program, _ = build(transformers.LlamaForCausalLM(LLAMA))
    bases = admissible_bases(program)
    residual = by_writer(bases, "embed_tokens.weight")
    assert (residual.dim, residual.group, len(residual.gains)) == (32, Group.ORTHOGONAL, 5)
    assert len(residual.writers) == 1 + 2 * 2
    assert len(residual.readers) == 2 * 5 + 1
    values = by_writer(bases, "layers.0.self_attn.v_proj.weight")
    assert (values.dim, values.heads, values.group) == (16, 2, Group.LINEAR)
    assert values.readers[0].index.tolist() == [[*range(8), *range(16, 24)], [*range(8, 16), *range(24, 32)]]  # GQA
    smooth = by_writer(bases, "layers.1.post_attention_layernorm.weight")
    assert smooth.group == Group.DIAGONAL
    assert [e.parameter.split(".")[-2] for e in smooth.readers] == ["gate_proj", "up_proj"]
    assert by_writer(bases, "layers.0.mlp.up_proj.weight").group == Group.DIAGONAL
    assert "silu" in " ".join(by_writer(bases, "layers.0.mlp.gate_proj.weight").pins)
    assert by_writer(bases, "layers.0.self_attn.q_proj.weight").group == Group.NONE


def test_the_sites_of_bert():
    program, _ = build(transformers.BertModel(BERT))
    bases = admissible_bases(program)
    values = by_writer(bases, "layer.0.attention.self.value.weight")
    assert (values.dim, values.heads, values.group) == (32, 4, Group.LINEAR)
    assert [e.parameter for e in values.writers] == [
        f"encoder.layer.0.attention.self.value.{p}" for p in ("weight", "bias")
    ]
    hidden = by_writer(bases, "embeddings.LayerNorm.weight")
    assert hidden.group == Group.NONE
    assert "LayerNorm subtracts the mean" in " ".join(hidden.pins)
    unwritten = next(b for b in bases if any("layer.0.output.dense.weight" in e.parameter for e in b.readers))
    assert not unwritten.writers
    assert "gelu" in unwritten.pins[0]


def test_relu_admits_positive_factors_only():
    program, weights = build(Toy())
    hidden = by_writer(find_bases(program).all, "up.weight")
    assert hidden.group == Group.POSITIVE_DIAGONAL
    expected = outputs(program, weights)
    positive = outputs(program, weights | fold(hidden, random_transform(hidden, Group.POSITIVE_DIAGONAL), weights))
    signed = outputs(program, weights | fold(hidden, random_transform(hidden, Group.DIAGONAL), weights))
    assert gate.relative(positive, expected) < 1e-5 < 1e-2 < gate.relative(signed, expected)


def test_an_operator_without_a_rule_pins_and_is_named():
    program, _ = build(Toy(odd=True))
    table = by_writer(find_bases(program).all, "table.weight")
    assert table.group == Group.NONE
    assert table.pins == ("`flip` has no rule",)


def test_a_parameter_used_twice_is_pinned():
    class Twice(Toy):
        def forward(self, ids):
            x = self.table(ids)
            return self.head(self.down(torch.relu(self.up(x))) + self.down(torch.relu(self.up(2 * x))))

    program, _ = build(Twice())
    assert "used more than once" in " ".join(by_writer(find_bases(program).all, "down.weight").pins)


def test_fused_projections_fall_apart_into_ranges():
    """Query, key and value in one matrix: only the rows of the values are free."""

    class Fused(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.qkv, self.out = nn.Embedding(50, 16), nn.Linear(16, 48), nn.Linear(16, 16)

        def forward(self, ids):
            q, k, v = self.qkv(self.table(ids)).view(*ids.shape, 3, 2, 8).permute(2, 0, 3, 1, 4).unbind(0)
            mixed = nn.functional.scaled_dot_product_attention(q, k, v)
            return self.out(mixed.transpose(1, 2).reshape(*ids.shape, 16))

    program = export_program(Fused().to("meta"))
    values = next(b for b in find_bases(program).all if b.group == Group.LINEAR and b.heads == 2)
    assert values.writers[0].index.tolist() == [list(range(32, 48))]
    assert values.readers[0].parameter == "out.weight"


def test_blocks_are_cut_where_the_module_list_is():
    program, _ = build(transformers.LlamaForCausalLM(LLAMA))
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
    assert gate.relative(outputs(program, weights), expected) < 1e-5
