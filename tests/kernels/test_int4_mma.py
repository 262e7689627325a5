"""Native int4 products: the unpacking twin in the interpreter, and the rewriting of PTX."""

from dataclasses import replace

import pytest
import torch

from quantize.kernels import int4_mma
from quantize.kernels.config import Config
from quantize.kernels.packed import pack_activations
from quantize.kernels.prepack import exact_gemm, prepack

TWIN = Config(16, 32, 256, variant="native", asm=False)


def rng(seed):
    return torch.Generator().manual_seed(seed)


def integers(*shape, seed):
    return torch.randint(-8, 8, shape, generator=rng(seed), dtype=torch.int8)


def operands(M, N, K, symmetric=True, q=None, a=None):
    """As the kernel takes them, and as the exact product does."""
    zero = None if symmetric else integers(N, 1, seed=3)
    a_zero = torch.zeros(M, dtype=torch.int32) if symmetric else integers(M, seed=4).int()
    pw = prepack(integers(N, K, seed=0) if q is None else q, torch.rand(N, 1, generator=rng(1)) + 0.1, zero, 4)
    a = integers(M, K, seed=2) if a is None else a
    qa = pack_activations(a, torch.rand(M, generator=rng(5)) + 0.1, a_zero, "int8")
    return (replace(qa, q=int4_mma.pack_signed(a), layout="s4"), int4_mma.as_signed(pw)), (qa, pw)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("M", "N", "K"), [(1, 32, 256), (17, 40, 128), (5, 70, 300), (33, 16, 512)])
def test_the_twin_is_exact(M, N, K, symmetric):
    ours, exact = operands(M, N, K, symmetric)
    bias = torch.randn(N, generator=rng(6))
    y = int4_mma.launch(*ours, bias, torch.float32, TWIN)
    torch.testing.assert_close(y, exact_gemm(*exact, bias, torch.float32), rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize("w", [-8, 7])
@pytest.mark.parametrize("a", [-8, 7])
def test_extremes(w, a):
    K = 384
    ours, exact = operands(2, 16, K, q=torch.full((16, K), w).to(torch.int8), a=torch.full((2, K), a).to(torch.int8))
    expected = w * a * K * exact[0].scale[:, None] * exact[1].scale
    torch.testing.assert_close(int4_mma.launch(*ours, None, torch.float32, TWIN), expected, rtol=1e-6, atol=0)


def test_where_the_nibbles_lie():
    q = torch.zeros(1, 128, dtype=torch.int8)
    q[0, 1], q[0, 65], q[0, 64] = -8, 7, -1
    byte = int4_mma.pack_signed(q)[0].view(torch.uint8)
    assert byte[[0, 1]].tolist() == [0xF0, 0x78]
    assert torch.equal(int4_mma.as_signed(prepack(q, torch.ones(1, 1), None, 4)).data, int4_mma.pack_signed(q))


def test_no_tokens():
    ours, _ = operands(0, 16, 128)
    assert int4_mma.launch(*ours, None, torch.float16, TWIN).shape == (0, 16)


def test_operands_in_another_layout_are_refused():
    ours, exact = operands(2, 16, 128)
    with pytest.raises(ValueError, match="not in w4 and s4"):
        int4_mma.launch(ours[0], exact[1], None, torch.float32, TWIN)


PTX = """.visible .entry int4_mma_kernel(
mma.sync.aligned.m16n8k32.row.col.satfinite.s32.s8.s8.s32 { %r1 };
mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 { %r2 };
mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 { %r3 };"""


def test_int8_products_become_int4_products():
    assert int4_mma.rewrite(PTX).splitlines()[1:] == [
        "mma.sync.aligned.m16n8k64.row.col.satfinite.s32.s4.s4.s32 { %r1 };",
        "mma.sync.aligned.m16n8k64.row.col.s32.s4.s4.s32 { %r2 };",
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 { %r3 };",
    ]


def test_no_other_kernel_is_rewritten():
    other = PTX.replace("int4_mma_kernel", "gemm_kernel")
    assert int4_mma.rewrite(other) == other


def test_products_of_another_kind_are_refused():
    with pytest.raises(RuntimeError, match=r"no mma\.m16n8k32\.s8"):
        int4_mma.rewrite(".visible .entry int4_mma_kernel(\nwgmma.mma_async")
