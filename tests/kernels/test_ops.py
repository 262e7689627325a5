"""The operators as torch's compilers and exporters see them, and the choice of kernels."""

from __future__ import annotations

import pytest
import torch
from helpers.opcheck import CHECKS
from helpers.operands import SCHEMES, activations, rng, weight

from quantize.kernels import custom_ops, gemm, grouped, split_k
from quantize.kernels.config import Config, choose_config, fitted, nearest_architecture, read_table
from quantize.kernels.ops import packed_linear, prepack, quantize_activations, quantized_linear
from quantize.kernels.packed import pack_activations
from quantize.kernels.prepack import exact_gemm, supported


def layer(groups=1, symmetric=False, bits=4, N=24, K=256, seed=0):
    """Stored weights: integers, scale, zero point."""
    low, high = -(1 << bits - 1), 1 << bits - 1
    q = torch.randint(low, high, (N, K), generator=rng(seed), dtype=torch.int8)
    scale = torch.rand(N, groups, generator=rng(seed + 1)) + 0.1
    zero = torch.randint(low, high, (N, groups), generator=rng(seed + 2), dtype=torch.int8)
    return q, scale, None if symmetric else zero


@pytest.mark.parametrize("layout", ["int8", "pair"])
def test_the_quantizer_is_a_proper_operator(layout):
    x = torch.randn(3, 200, generator=rng())
    torch.library.opcheck(custom_ops.quantize_tokens, (x, 4, False, 0.9, layout, 50), test_utils=CHECKS)


@pytest.mark.parametrize("groups", [1, 2])
def test_the_product_is_a_proper_operator(groups):
    qa, pw = activations(3, 256, symmetric=False, group_size=256 // groups), weight(20, 256, 4, groups, False)
    arguments = (qa.tensors(), "int8", pw.tensors(), 256, "w4", torch.ones(20), torch.float16)
    torch.library.opcheck(custom_ops.gemm, arguments, test_utils=CHECKS)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiles_without_a_break(backend):
    pw = prepack(*layer(), 4)
    x = torch.randn(2, 5, 256, generator=rng())
    compiled = torch.compile(lambda x: packed_linear(x, pw, None, 4, False, 1.0), backend=backend, fullgraph=True)
    assert torch.equal(compiled(x), packed_linear(x, pw, None, 4, False, 1.0))


def test_exports_with_any_number_of_tokens():
    class Linear(torch.nn.Module):
        def forward(self, x):
            return packed_linear(x, pw, None, 8, True, 1.0)

    pw = prepack(*layer(), 4)
    tokens = torch.export.Dim("tokens", min=2, max=100)
    program = torch.export.export(Linear(), (torch.zeros(4, 256),), dynamic_shapes=({0: tokens},))
    x = torch.randn(7, 256, generator=rng())
    assert "quantize_model.gemm" in program.graph_module.code
    assert torch.equal(program.module()(x), packed_linear(x, pw, None, 8, True, 1.0))


@pytest.mark.parametrize("bits", [(8, 8), (4, 8), (4, 4)])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("symmetric", [True, False])
def test_packed_operands_give_what_the_reference_gives(symmetric, groups, bits):
    stored, grid = layer(groups, symmetric, bits[0]), (bits[1], symmetric, 0.9)
    x, bias = torch.randn(2, 3, 256, generator=rng()), torch.randn(24, generator=rng(1))
    assert torch.equal(
        packed_linear(x, prepack(*stored, bits[0]), bias, *grid), quantized_linear(x, *stored, bias, *grid)
    )


@pytest.mark.usefixtures("on_triton", "poisoned")
def test_which_kernel_runs(monkeypatch):
    ran = []
    for module in (gemm, grouped, split_k):
        name = module.__name__.rsplit(".", 1)[-1]
        monkeypatch.setattr(
            module, "launch", lambda *args, name=name, launch=module.launch: ran.append(name) or launch(*args)
        )
    for tokens, groups in ((2, 1), (70, 1), (2, 4)):
        x, pw = torch.randn(tokens, 256, generator=rng()), prepack(*layer(groups), 4)
        y, expected = packed_linear(x, pw, None, 8, True, 1.0), quantized_linear(x, *layer(groups), None, 8, True, 1.0)
        assert float((y - expected).abs().max()) <= (groups > 1) * 1e-6 * float(expected.abs().max())
    assert ran == ["split_k", "gemm", "grouped"]


def test_what_the_kernels_know():
    assert all(supported(4096, group, 4) for group in (0, 32, 64, 128, 256))
    assert not any(supported(4096, group, 4) for group in (16, 48, 96, 160))
    assert supported(1 << 16, 0, 4) and supported(1 << 16, 128, 8) and not supported(1 << 16, 0, 8)


def test_every_shape_finds_a_configuration_that_fits():
    for arch in read_table():
        for scheme in ("w8a8", "w4a8", "w4a4", "w8a8g", "w4a8g"):
            for M in (0, 1, 100, 5000):
                config = choose_config(M, 70, 384, scheme, arch)
                assert 384 % config.block_k == 0 and config.split_k <= 3
                assert config.split_k == 1 or 4 * config.block_m >= M


def test_the_nearest_row_is_taken():
    assert choose_config(4096, 14336, 4096, "w4a8", "sm_90").block_m == 128
    assert choose_config(1, 14336, 4096, "w4a8", "sm_90").block_m == 16
    assert (
        choose_config(16, 4096, 14336, "w4a8", "sm_90").split_k
        > choose_config(16, 14336, 4096, "w4a8", "sm_90").split_k
    )


@pytest.mark.parametrize(
    ("arch", "stands_in"), [("sm_86", "sm_80"), ("sm_121", "sm_120"), ("sm_75", "sm_80"), ("gfx950", "gfx942")]
)
def test_architectures_that_are_not_tabled(arch, stands_in):
    assert nearest_architecture(arch) == stands_in


def test_a_long_step_is_shortened_to_fit():
    assert fitted(Config(block_k=256, split_k=8), 1, 384, False) == Config(block_k=128, split_k=3)
    assert fitted(Config(split_k=8), 100, 4096, False).split_k == 1


@pytest.mark.usefixtures("poisoned")
def test_the_longest_sums_do_not_overflow():
    """All columns at the ends of their ranges: 16 times the sum would be beyond int32."""
    K, one = 35200, torch.ones(1, 1)
    pw = prepack(torch.full((1, K), -8, dtype=torch.int8), one, torch.full((1, 1), 7, dtype=torch.int8), 4)
    qa = pack_activations(torch.full((1, K), -128, dtype=torch.int8), one[0], torch.tensor([127]), "int8")
    y = gemm.launch(qa, pw, None, torch.float32, choose_config(1000, 1, K, "w4a8", "interpreter"))
    assert y.item() == 15 * 255 * K


@pytest.mark.parametrize(
    ("scheme", "config", "found"),
    [
        ("W4A8 shift", Config(variant="pair"), "pair multiplies"),
        ("W4A4 pair", Config(variant="shift"), "shift multiplies"),
        ("W8A8", Config(variant="bytes", block_k=512), "no multiple of 512"),
    ],
)
def test_operands_that_do_not_fit(scheme, config, found):
    bits_w, bits_a, layout, _ = SCHEMES[scheme]
    with pytest.raises(ValueError, match=found):
        gemm.launch(activations(1, 256, bits_a, layout), weight(1, 256, bits_w), None, torch.float32, config)


def test_sums_and_tiles_that_are_missing():
    with pytest.raises(ValueError, match="4 zero points of a channel need as many sums"):
        grouped.launch(activations(1, 256), weight(1, 256, 4, 4, False), None, torch.float32, Config())
    with pytest.raises(ValueError, match="no grouped kernel for groups of 48"):
        grouped.launch(activations(1, 96), weight(1, 96, 4, 2), None, torch.float32, Config())
    with pytest.raises(ValueError, match="10 tiles are split"):
        split_k.launch(activations(160, 128), weight(1, 128), None, torch.float32, Config(split_k=2))


def test_quantized_activations_hold_what_the_reference_rounds():
    qa = quantize_activations(torch.tensor([[0.0, 3.0, -1.0, 7.0]]), 4, True, 1.0)
    assert qa.q[0, :5].tolist() == [0, 3, -1, 7, 0]
    assert (qa.scale.item(), qa.zero_point.item(), qa.sum.item()) == (1, 0, 9)
    assert exact_gemm(qa, weight(3, 4), None, torch.float32).shape == (1, 3)
