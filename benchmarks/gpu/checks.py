"""What `make bench-gpu-run` times must be right first: columns of GPTQ, products, and small models from end to end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.gpu.bench import distance
from benchmarks.gpu.engines import OURS, Contender, contenders
from benchmarks.scale.model import write_model, write_tokens
from quantize.artifact.load import load
from quantize.artifact.verify import verify_artifact
from quantize.calibration.statistics import Gram
from quantize.nn.quantized_linear import QuantizedLinear
from quantize.pipeline.quantize import quantize_model
from quantize.quantizers import QUANTIZERS
from quantize.quantizers.column_rounding import QParams, round_columns
from quantize.quantizers.gptq import require_gram
from quantize.scheme.scheme import Scheme, WeightArgs

CODES = 1e-3  # of integers may differ, as sums of another order move a value over a tie
GRAM = 2e-4  # of the diagonal (tests/calibration/test_gram_sums.py)
LOSS = 1e-2  # relative; a code that moved moves all columns behind it in its row
NEAR = 5e-3  # relative, of a model whose activations fall on ties (tests/nn/test_gpu_dispatch.py)
PRODUCT = (40, 256, 256)  # M, N, K
LEVELS = ("iq4_nl", "nf4", "q4_1")  # formats of weights that are looked up, or have zero points between integers
Check = tuple[str, Callable[[], float], float]  # its name, what measures a difference, and the largest allowed


def check(device: torch.device, folder: Path) -> dict[str, float]:
    """Return by how much each result on a device differs from that of the CPU's code.

    Args:
        device: where it runs.
        folder: an empty directory for small models.

    Raises:
        ArithmeticError: a result is wrong, or there is none; the message is one sentence.
    """
    found = dict[str, float]()
    for name, measure, allowed in checks(device, folder):
        try:
            found[name] = measure()
        except Exception as error:  # whatever fails, nothing is to be timed
            raise ArithmeticError(f"nothing was measured, because {name} failed: {error}") from error
        if not found[name] <= allowed:
            raise ArithmeticError(
                f"nothing was measured, because {name} differs by {found[name]:.1e} where {allowed:.0e} is allowed"
            )
    return found


def checks(device: torch.device, folder: Path) -> Iterator[Check]:
    """Yield the checks, from the smallest part to whole models."""
    yield "columns of GPTQ: codes", partial(columns, device), CODES
    yield "Gram matrix in bfloat16", partial(gram_matrix, device), GRAM
    yield "GPTQ: loss", partial(loss, device), LOSS
    for contender in contenders(device):
        if contender.name in OURS or contender.name == "W4A16 g128":
            yield f"product {contender.name}", partial(product, contender, device), contender.tolerance
    for name in LEVELS:
        yield f"product of {name} weights", partial(levels, name, device), NEAR
    for scheme in ("W4A16", "W4A8"):
        yield f"model in {scheme}: output", partial(model, scheme, device, folder / scheme), NEAR


def columns(device: torch.device, rows: int = 300) -> float:
    """Return the part of the codes of 128 columns that differs from float64 on the CPU, which runs no kernel."""
    rng = torch.Generator().manual_seed(0)
    W, feedback = torch.randn(128, rows, generator=rng), torch.randn(128, 128, generator=rng) * 0.1
    scale, zero = torch.rand(128, rows, generator=rng) * 0.1 + 0.2, torch.randint(-8, 8, (128, rows), generator=rng)

    def codes(*tensors: Tensor) -> Tensor:
        target, reference, influence, scales, zeros = tensors
        round_columns(target, reference, influence, QParams(scales, zeros, WeightArgs(num_bits=4, symmetric=False)))
        return target.cpu().double()

    given = (W, W, feedback, scale, zero.float())
    found = codes(*(x.to(device, copy=True) for x in given))
    expected = codes(*(x.double() for x in given))
    return float((found != expected).float().mean())


def gram_matrix(device: torch.device) -> float:
    """Return the largest difference of a sum of bfloat16 products from that in float64, as a part of its diagonal."""
    rng = torch.Generator().manual_seed(0)
    batches, gram = [(torch.randn(512, 96, generator=rng) + 1).bfloat16() for _ in range(8)], Gram()
    for x in batches:
        gram.update(x.to(device), dtype=torch.bfloat16)
    rows = torch.cat(batches).double()
    exact = rows.T @ rows
    size = exact.diagonal().sqrt()
    return float(((require_gram(gram)[1].cpu() - exact).abs() / size / size[:, None]).max())


def loss(device: torch.device) -> float:
    """Return the relative difference of GPTQ's loss tr(E H Eᵀ) on a device from that on the CPU."""
    rng = torch.Generator().manual_seed(0)
    W, x = torch.randn(96, 256, generator=rng), torch.randn(1024, 256, generator=rng)
    x = x @ torch.randn(256, 256, generator=rng)  # correlated, so that columns move one another

    def lost(at: torch.device) -> float:
        gram = Gram()
        gram.update(x.to(at))
        (q,) = QUANTIZERS["gptq"]().quantize_weights(
            [W.to(at)], WeightArgs(num_bits=4, group_size=128), gram, torch.float32
        )
        return float(((W - q.dequantize().cpu()) @ x.T).double().square().sum())

    return abs(lost(device) / lost(torch.device("cpu")) - 1)


def product(contender: Contender, device: torch.device) -> float:
    """Return the relative distance of a product from an exact one."""
    return distance(contender.case(*PRODUCT, torch.Generator(device).manual_seed(0)))


def levels(name: str, device: torch.device) -> float:
    """Return the relative difference of a linear with weights of a format on a device from that on the CPU."""
    (M, N, K), rng = PRODUCT, torch.Generator().manual_seed(0)
    args = WeightArgs(num_bits=4, format=name, group_size=32, symmetric=name != "q4_1")
    W = QUANTIZERS["rtn"]().quantize(torch.randn(N, K, generator=rng), args, None, torch.bfloat16)
    layer, x = QuantizedLinear(W, None, Scheme(weights=args)), torch.randn(M, K, generator=rng).bfloat16()
    expected, found = layer(x).float(), layer.to(device)(x.to(device)).float().cpu()
    return float((found - expected).norm() / expected.norm())


def model(scheme: str, device: torch.device, folder: Path) -> float:
    """Return the relative difference of a tiny model that was quantized and runs on a device from the reference.

    Raises:
        QuantizeError: the artifact is damaged, or gives another output than the run recorded.
    """
    write_model(folder / "model", "tiny", 1, device.type)
    write_tokens(folder / "tokens.jsonl", "tiny", 4, 64)
    made = quantize_model(folder / "model", output_dir=folder / "out", scheme=scheme, device=device, nsamples=4,
                          recipe={"passes": [], "quantizer": {"name": "gptq"}}, calibration=folder / "tokens.jsonl",
                          seqlen=64, group_size=0).directory  # fmt: skip
    verify_artifact(made)
    return output(made, device)


def output(artifact: Path, device: torch.device) -> float:
    """Return the relative difference of an artifact's output on a device from that of the reference on the CPU."""
    ids = torch.arange(32).view(2, 16)
    with torch.no_grad():
        found = load(artifact, device=device)(ids.to(device)).logits.cpu()
        expected = load(artifact, engine="reference")(ids).logits
    return float((found - expected).norm() / expected.norm())
