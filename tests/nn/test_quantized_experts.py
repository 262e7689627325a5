"""Quantized experts compute what each expert's quantized linear computes, wherever a model's code multiplies."""

import pytest
import torch
import transformers.integrations.moe  # noqa: F401  (registers its product)
from torch.nn import functional

from quantize.formats.qtensor import QTensor
from quantize.graph.stack_stand_in import Stack
from quantize.nn.quantized_experts import QuantizedExperts, replace_parameter
from quantize.nn.quantized_linear import QuantizedLinear
from quantize.quantizers.rtn import RoundToNearest
from quantize.scheme.scheme import ActivationArgs, Scheme, WeightArgs
from quantize.transforms.online import hadamard

E, N, K = 3, 6, 8
OFFS = torch.tensor([2, 2, 5], dtype=torch.int32)  # expert 1 has no rows; the last of 6 rows belongs to none
W4A16 = Scheme(weights=WeightArgs(num_bits=4, group_size=4, symmetric=False))
W4A8 = Scheme(weights=WeightArgs(num_bits=4, group_size=4), activations=ActivationArgs(num_bits=8))


def rounded(scheme: Scheme, seed: int = 0) -> QTensor:
    W = torch.randn(E * N, K, generator=torch.Generator().manual_seed(seed))
    return RoundToNearest().quantize(W, scheme.weights, None, torch.float32)


def experts(scheme: Scheme = W4A16, transposed: bool = False, bias=None, online=()) -> QuantizedExperts:
    return QuantizedExperts(rounded(scheme), bias, scheme, online, E, transposed)


def rows(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, K, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("engine", ["reference", "fake_quant"])
@pytest.mark.parametrize("scheme", [W4A16, W4A8])
def test_each_expert_multiplies_its_own_rows(scheme, engine):
    bias, online = torch.arange(E * N).float(), (hadamard(8),)
    stack, x = experts(scheme, bias=bias, online=online), rows(6)
    stack.engine = engine
    y = stack(x, OFFS)
    start = 0
    for e, end in enumerate(OFFS.tolist()):
        part = slice(e * N, (e + 1) * N)
        linear = QuantizedLinear(rounded(scheme).slice_rows(part), bias[part], scheme, online)
        linear.engine = engine
        assert end == start or torch.equal(y[start:end], linear(x[start:end]))
        start = end
    assert y.shape == (6, N)
    assert not y[5:].any()
    together = rows(E, 2)
    assert torch.equal(stack(together)[2], stack(together[2], torch.tensor([0, 0, 2])))


def test_each_expert_has_a_global_scale_of_its_own():
    """NVFP4's scale of the whole weight is that of one expert."""
    W = torch.randn(E, N, 32, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 100, 1e4])[:, None, None]
    args = WeightArgs(num_bits=4, group_size=16, format="nvfp4")
    apart = [RoundToNearest().quantize(w, args, None, torch.float32) for w in W]
    together = apart[0].cat_rows([weight.tensors() for weight in apart])
    together.check("experts")
    assert together.global_scale.shape == (E * N, 1) and apart[0].global_scale.shape == ()
    stack = QuantizedExperts(together, None, Scheme(weights=args), (), E, False)
    for e, weight in enumerate(apart):
        own = stack.expert(e).qtensor()
        assert torch.equal(own.global_scale, weight.global_scale) and own.global_scale.shape == ()
        assert torch.equal(own.dequantize(), weight.dequantize())
        assert torch.equal(together.dequantize()[e * N : (e + 1) * N], weight.dequantize())


def loop_linear(x, W):
    return torch.stack([functional.linear(x, W[e]) for e in range(E)])


def loop_matmul(x, W):
    return torch.stack([x @ W[torch.tensor(e)].T for e in range(E)])


def batched(x, W):
    return torch.bmm(x.expand(E, -1, -1), W.transpose(1, 2))


def matmul(x, W):
    return torch.matmul(x.expand(E, -1, -1), W.mT)


def grouped(x, W):
    offs = torch.tensor([len(x), 2 * len(x), 3 * len(x)], dtype=torch.int32)
    return torch._grouped_mm(x.repeat(E, 1), W.transpose(-2, -1), offs=offs).unflatten(0, (E, -1))


def fallback(x, W):
    offs = torch.tensor([len(x), 2 * len(x), 3 * len(x)], dtype=torch.int32)
    run = torch.ops.transformers.grouped_mm_fallback
    return run(x.repeat(E, 1).to(W.dtype), W.transpose(-2, -1), offs=offs).unflatten(0, (E, -1))


def gathered_left(x, W):
    numbers = torch.arange(E).flip(0).repeat_interleave(len(x))
    y = torch.bmm(W[numbers], x.repeat(E, 1).unsqueeze(-1)).squeeze(-1)
    return y.unflatten(0, (E, -1)).flip(0)


def gathered_right(x, W):
    numbers = torch.arange(E).repeat_interleave(len(x))
    return torch.bmm(x.repeat(E, 1)[:, None], W.transpose(1, 2)[numbers]).squeeze(1).unflatten(0, (E, -1))


def left(x, W):
    return torch.stack([(W[e] @ x.T).T for e in range(E)])


def einsum(x, W):
    return torch.einsum("sk,enk->esn", x, W)


def sliced(x, W):
    return torch.cat([torch.bmm(x.expand(1, -1, -1), W[e : e + 1].mT) for e in range(E)])


CODES = [loop_linear, loop_matmul, batched, matmul, grouped, fallback, gathered_left, gathered_right, left]


@pytest.mark.parametrize("transposed", [False, True], ids=["out-in", "in-out"])
@pytest.mark.parametrize("code", [*CODES, einsum, sliced], ids=lambda code: code.__name__)
def test_code_that_multiplies_with_the_parameter_multiplies_with_the_experts(code, transposed):
    stack, x = experts(transposed=transposed), rows(4)
    W = rounded(W4A16).dequantize().unflatten(0, (E, N))
    place = stack.mT if transposed else stack
    assert place.shape == W.shape
    assert place.size(1) == N
    assert (place.dim(), place.dtype, place.device) == (3, torch.float32, W.device)
    torch.testing.assert_close(code(x, place), code(x, W))


@pytest.mark.parametrize("code", CODES, ids=lambda code: code.__name__)
def test_the_products_run_on_integers(code, monkeypatch):
    """The weights in floating point are what an operator gets that is not known; these are."""
    monkeypatch.setattr(Stack, "dequantize", None)
    code(rows(4), experts(W4A8))


def test_experts_stand_in_the_place_of_a_parameter_and_follow_their_model():
    model = torch.nn.Module()
    model.mlp = torch.nn.Module()
    model.mlp.register_parameter("up", torch.nn.Parameter(torch.zeros(E, N, K)))
    replace_parameter(model, "mlp.up", stack := experts())
    assert model.mlp.up is stack
    assert not list(model.parameters())
    before = stack(rows(6), OFFS)
    model.to(torch.bfloat16)
    assert stack.dtype == torch.bfloat16
    assert stack(rows(6).bfloat16(), OFFS).dtype == torch.bfloat16
    other = QuantizedExperts(rounded(W4A16, seed=5), None, W4A16, (), E)
    model.float().load_state_dict({f"mlp.up.{name}": x for name, x in other.state_dict().items()})
    assert torch.equal(stack(rows(6), OFFS), other(rows(6), OFFS))
    assert not torch.equal(stack(rows(6), OFFS), before)


def test_experts_are_counted_and_gone_through_as_a_tensor_is():
    stack, W = experts(), rounded(W4A16).dequantize().unflatten(0, (E, N))
    assert len(stack) == E
    for own, expected in zip(list(stack), W, strict=True):
        assert torch.equal(own.dequantize(), expected)
    assert torch.equal(stack[-1].dequantize(), W[-1])
    with pytest.raises(IndexError, match="expert 3 of 3"):
        stack[3]
