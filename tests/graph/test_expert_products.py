"""Products with gathered weights, einsums and loops over experts are linears of a stack, and run on integers."""

import json

import pytest
import torch
from torch import nn
from torch.nn import functional

from quantize.artifact.load import load
from quantize.graph.export import export_program
from quantize.graph.interpreter import Overrides, run_nodes, start
from quantize.graph.linears import STACK, STACK_READ
from quantize.nn.quantized_experts import QuantizedExperts
from quantize.pipeline.quantize import quantize_model


def gathered(m, x, weights, chosen):
    """The small-token path of transformers: a weight for each pair of token and expert."""
    tokens = torch.arange(x.shape[0]).unsqueeze(1).expand(-1, 2).reshape(-1)
    inner = torch.bmm(m.rise[chosen.flatten()], x[tokens].unsqueeze(-1)).squeeze(-1).relu()
    y = torch.bmm(inner.unsqueeze(1), torch.index_select(m.fall, 0, chosen.flatten())).squeeze(1)
    return (y * weights.flatten()[:, None]).view(-1, 2, 8).sum(1)


def einsum_of_gathered(m, x, weights, chosen):
    inner = torch.einsum("tk,tank->tan", x, m.rise[chosen]).relu()
    return (torch.einsum("tan,tank->tka", inner, m.fall[chosen]) * weights[:, None]).sum(2)


def matmul_of_gathered(m, x, weights, chosen):
    inner = (x[:, None, None] @ m.rise[chosen].transpose(-1, -2)).relu()
    return ((inner @ m.fall[chosen]).squeeze(2) * weights[..., None]).sum(1)


def by_token(m, x, weights, chosen):
    """Return the weight of each expert for each token, [T, E]."""
    return x.new_zeros(x.shape[0], len(m.rise)).scatter(1, chosen, weights)


def loop(m, x, weights, chosen):
    shares, y = by_token(m, x, weights, chosen), x * 0
    for e in range(len(m.rise)):
        y = y + (functional.linear(x, m.rise[e]).relu() @ m.fall[e]) * shares[:, e, None]
    return y


def loop_over_parts(m, x, weights, chosen):
    shares, y = by_token(m, x, weights, chosen), x * 0
    for e, (rise, fall) in enumerate(zip(m.rise, m.fall, strict=True)):
        y = y + ((x @ rise.T).relu() @ fall) * shares[:, e, None]
    return y


def einsum_of_all(m, x, weights, chosen):
    inner = torch.einsum("tk,enk->ten", x, m.rise).relu()
    return (torch.einsum("ten,enk->tek", inner, m.fall) * by_token(m, x, weights, chosen)[..., None]).sum(1)


def matmul_of_all(m, x, weights, chosen):
    inner = (x @ m.rise.transpose(1, 2)).relu()
    return ((inner @ m.fall) * by_token(m, x, weights, chosen).T[..., None]).sum(0)


def loop_over_split_rows(m, x, weights, chosen):
    """The experts' rows one after the other, as many as the router gives each (JetMoE)."""
    order = chosen.flatten().argsort(stable=True)
    sizes = x.new_zeros(x.shape[0], 4).scatter(1, chosen, 1).long().sum(0).tolist()
    inner = torch.cat([functional.linear(part, m.rise[e]) for e, part in enumerate(x[order // 2].split(sizes))]).relu()
    y = torch.cat([part @ m.fall[e] for e, part in enumerate(inner.split(sizes))])
    return torch.zeros_like(x).index_add(0, order // 2, y * weights.flatten()[order, None])


BY_ROW = [gathered, einsum_of_gathered, matmul_of_gathered, loop_over_split_rows]
FORMS = [*BY_ROW, loop, loop_over_parts, einsum_of_all, matmul_of_all]


class Routed(nn.Module):
    """Tokens go to two of four experts; `body` computes with the stacks of their weights."""

    def __init__(self, body) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.words, self.chooser = body, nn.Embedding(32, 8), nn.Linear(8, 4)
        self.rise, self.fall = (nn.Parameter(torch.randn(4, 6, 8) / 2) for _ in range(2))
        self.score = nn.Linear(8, 32, bias=False)

    def forward(self, input_ids):
        x = self.words(input_ids).flatten(0, 1)
        weights, chosen = self.chooser(x).softmax(-1).topk(2, dim=-1)
        return self.score(x + self.body(self, x, weights, chosen)).unflatten(0, input_ids.shape)


def run(program, model, ids):
    values = start(program, ids)
    weights = {name: p.detach() for name, p in model.named_parameters()}
    run_nodes(program, [node for s in program.segments for node in s.nodes], values, Overrides(weights))
    return values[program.output.all_input_nodes[0]]


@pytest.mark.parametrize("body", FORMS)
def test_products_in_other_forms_are_linears_of_a_stack(body):
    program, ids = export_program(Routed(body)), torch.arange(21).view(3, 7)
    found = {x.path: x for x in program.all_linears if x.experts}
    assert found.keys() == {"rise", "fall"} and not program.not_replaceable
    assert (found["rise"].columns, found["fall"].columns) == (8, 6)
    assert (found["rise"].transposed, found["fall"].transposed) == (False, True)
    assert all((x.offsets is not None) == (body in BY_ROW) for x in found.values())
    assert program.gathers_tokens(found["rise"]) == (body in BY_ROW) and not program.gathers_tokens(found["fall"])
    assert program.routers == {"chooser"}
    with torch.no_grad():
        torch.testing.assert_close(run(program, model := Routed(body), ids), model(ids))


def read_once_more(m, x, weights, chosen):
    return loop(m, x, weights, chosen) + m.rise[0, 0]


def half_of_a_loop(m, x, weights, chosen):
    del weights, chosen
    return x + sum((functional.linear(x, m.rise[e]) @ m.fall[e]) for e in range(3))


def one_behind_the_other(m, x, weights, chosen):
    del weights, chosen
    for e in range(4):
        x = functional.linear(x, m.rise[e]).relu() @ m.fall[e]
    return x


@pytest.mark.parametrize("body", [read_once_more, half_of_a_loop, one_behind_the_other])
def test_what_is_no_product_of_all_experts_stays_as_it_is(body):
    program, model, ids = export_program(Routed(body)), Routed(body), torch.arange(8).view(2, 4)
    assert program.not_replaceable["rise"] in (STACK, STACK_READ)
    with torch.no_grad():
        torch.testing.assert_close(run(program, model, ids), model(ids))


@pytest.mark.slow
@pytest.mark.parametrize("body", FORMS)
def test_a_loaded_model_multiplies_integers_in_its_own_form(body, tmp_path, monkeypatch):
    rows = torch.randint(32, (24, 8), generator=torch.Generator().manual_seed(1))
    text = tmp_path / "ids.jsonl"
    text.write_text("\n".join(json.dumps({"input_ids": row.tolist()}) for row in rows))
    settings = {"calibration": text, "nsamples": 24, "seqlen": 8, "group_size": 0, "recipe": {"passes": []}}
    artifact = quantize_model(Routed(body), output_dir=tmp_path / "out", scheme="W4A8", **settings)
    assert artifact.manifest["coverage"]["rise"] == artifact.manifest["coverage"]["fall"] == "quantized"
    found, model = load(artifact.directory, skeleton=Routed(body)), Routed(body)
    assert isinstance(found.rise, QuantizedExperts)
    monkeypatch.setattr(QuantizedExperts, "dequantize", None)  # no operator gets the weights in floating point
    with torch.no_grad():
        y, wanted = found(rows[:3]), model(rows[:3])
    assert float((y - wanted).norm() / wanted.norm()) < 0.2
