"""Claims of papers on outlier handlers are inequalities, measured on synthetic activations from seeded generators.

They compare outputs of one linear with [256, 1024] activations and weights of 4 bits, with one scale for each row,
rounded to nearest.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.claims.claim import Claim, Measure
from quantize.calibration.statistics import Gram
from quantize.kernels.halo import input_gradient
from quantize.quantizers import QUANTIZERS
from quantize.quantizers.base import fake_quantize_weight
from quantize.scheme.scheme import ActivationArgs, RuntimeSmoothArgs, WeightArgs
from quantize.transforms.dual_rotation import dual_rotation
from quantize.transforms.kurtosis import kurtosis
from quantize.transforms.online import Hadamard, InputTransform, Shift

TOKENS, K, N = 256, 1024, 256
W4, A4 = WeightArgs(num_bits=4), ActivationArgs(num_bits=4)
ROTATION = (Hadamard(K),)


def smoothed(normalize: bool = True) -> ActivationArgs:
    """Return the settings of 4-bit activations with runtime smooth in groups of 128."""
    return A4.model_copy(update={"runtime_smooth": RuntimeSmoothArgs(normalize_tokens=normalize)})


FRONTS = {
    "RTN": InputTransform((), A4),
    "rotation": InputTransform(ROTATION, A4),
    "RS": InputTransform((), smoothed(normalize=False)),
    "RRS": InputTransform(ROTATION, smoothed()),
    "RRS, paper's rule": InputTransform(ROTATION, smoothed(normalize=False)),
}


def normal(rows: int, columns: int, seed: int) -> Tensor:
    """Draw float32 [rows, columns] from a normal distribution."""
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def signed_channels() -> tuple[Tensor, Tensor]:
    """Return inputs with 16 channels that are 30 times as large and have one sign each; all tokens count."""
    X = normal(TOKENS, K, 0)
    sign = torch.where(torch.rand(16, generator=torch.Generator().manual_seed(0)) < 0.5, -1.0, 1.0)
    X[:, :16] = 30 * sign * (1 + 0.2 * X[:, :16])
    return X, torch.ones(TOKENS, dtype=torch.bool)


def spikes(count: int) -> tuple[Tensor, Tensor]:
    """Return inputs in which one token of 16 has some equal spikes of 1000; only the other tokens count."""
    X, others = normal(TOKENS, K, 0), torch.arange(TOKENS) % 16 != 0
    X[~others, :count] = 1000.0
    return X, others


def output_error(input_transform: InputTransform, X: Tensor, counted: Tensor) -> float:
    """Return ‖Q(X) Q(W)ᵀ - X Wᵀ‖² / ‖X Wᵀ‖² over the tokens that count."""
    W = normal(N, K, 1) / K**0.5
    found, target = (
        input_transform.quantized(X) @ fake_quantize_weight(input_transform.fold_into_weight(W), W4).T,
        X @ W.T,
    )
    return float((found - target)[counted].square().sum() / target[counted].square().sum())


def against(left: str, right: str, data: tuple[Tensor, Tensor]) -> Measure:
    """Compare the errors of two of `FRONTS` on the same activations."""
    return lambda: (output_error(FRONTS[left], *data), output_error(FRONTS[right], *data))


def flattened() -> tuple[float, float]:
    """Return the kurtosis of a token with four channels of 30, after a Hadamard matrix and before it."""
    X = normal(TOKENS, K, 0)
    X[:, :4] *= 30
    before, after = kurtosis(X).mean(), kurtosis(Hadamard(K)(X)).mean()
    return float(after), float(before)


def held_out(quantizer: str) -> Measure:
    """Compare a quantizer with rounding to nearest, on correlated inputs that neither has seen."""

    def measure() -> tuple[float, float]:
        X, W, gram = normal(1024, 64, 0) @ (normal(64, 64, 5) * torch.logspace(0, -2, 64)), normal(32, 64, 1), Gram()
        gram.update(X[:512])
        made = (QUANTIZERS[name]().quantize(W, W4, gram, torch.float32) for name in (quantizer, "rtn"))
        left, right = (float((X[512:] @ (W - w.dequantize()).T).square().mean()) for w in made)
        return left, right

    return measure


def heavy_tail(symmetric: bool, shift: float, noise: float) -> float:
    """Return the error of a skewed input after NoisyQuant's bias of some mean and amplitude, in steps."""
    X = normal(TOKENS, K, 0).exp()
    step = float(X.amax(-1).mean()) / 7
    n = step * (shift + noise * (torch.rand(K, generator=torch.Generator().manual_seed(3)) * 2 - 1))
    input_transform = InputTransform((Shift(n),), ActivationArgs(num_bits=4, symmetric=symmetric))
    W = normal(N, K, 1)
    return float(((input_transform.quantized(X) - X) @ W.T).square().sum() / (X @ W.T).square().sum())


AMPLITUDES = tuple(i / 10 for i in range(21))


def searched_noise() -> tuple[float, float]:
    """Return the errors of the best amplitude of noise, which may be none, and of no noise."""
    return min(heavy_tail(True, 0.0, n) for n in AMPLITUDES), heavy_tail(True, 0.0, 0.0)


def noise_or_zero_point() -> tuple[float, float]:
    """Return the errors of the best shift and noise on a symmetric grid, and of a zero point."""
    best = min(heavy_tail(True, -m, n) for m in AMPLITUDES[::4] for n in AMPLITUDES[::4])
    return best, heavy_tail(False, 0.0, 0.0)


def left_hadamard() -> tuple[float, float]:
    """Return HALO-2's and HALO-0's errors in a linear's int8 input gradient, with 4 of 512 tokens 60 × as large."""
    Ey, W = normal(512, N, 0), normal(N, N, 1)
    Ey[::128] *= 60
    target = Ey @ W
    left, right = (float((input_gradient(Ey, W, h) - target).square().sum()) for h in (True, False))
    return left / float(target.square().sum()), right / float(target.square().sum())


def dual_or_hadamard() -> tuple[float, float]:
    """Return the errors of DuQuant's dual rotation and a Hadamard matrix, with one channel of 200, on unseen tokens."""
    X = normal(2 * TOKENS, K, 0)
    X[:, 3] *= 200
    dual = dual_rotation(X[:TOKENS], torch.Generator().manual_seed(0))
    left, right = (rounding_error(rotated(X[TOKENS:])) for rotated in (dual.apply, Hadamard(K)))
    return left, right


def rounding_error(x: Tensor) -> float:
    """Return the relative error of 4-bit tokens."""
    return float((InputTransform((), A4).quantized(x) - x).square().sum() / x.square().sum())


CHANNELS, ONE, TWO, FOUR = signed_channels(), spikes(1), spikes(2), spikes(4)
CLAIMS: Sequence[Claim] = (
    Claim("rotation flattens: kurtosis from > 100 to < 4", "2404.00456", 0.04, True, flattened),
    Claim("rotation ≤ ½ RTN (30 × signed channels)", "2404.00456", 0.5, True, against("rotation", "RTN", CHANNELS)),
    Claim("runtime smooth ≤ ½ RTN (30 × signed channels)", "2409.20361", 0.5, True, against("RS", "RTN", CHANNELS)),
    Claim("RRS ≤ 0.8 rotation (signed channels)", "2409.20361", 0.8, True, against("RRS", "rotation", CHANNELS)),
    Claim("RRS in groups ≤ rotation (one spike)", "2409.20361", 1.0, True, against("RRS", "rotation", ONE)),
    Claim("RRS, normalized ≤ 1.05 rotation (two spikes)", "ours", 1.05, True, against("RRS", "rotation", TWO)),
    Claim("RRS, normalized ≤ 1.05 rotation (four spikes)", "ours", 1.05, True, against("RRS", "rotation", FOUR)),
    Claim(
        "RRS, paper's rule ≤ 1.05 rotation (one spike)", "2409.20361", 1.05, True,
        against("RRS, paper's rule", "rotation", ONE),
    ),
    Claim(
        "RRS, paper's rule ≤ 1.05 rotation (two spikes)", "2409.20361", 1.05, False,
        against("RRS, paper's rule", "rotation", TWO),
    ),
    Claim("GPTQ ≤ ½ RTN (correlated inputs, held out)", "2210.17323", 0.5, True, held_out("gptq")),
    Claim("HALO: left Hadamard ≤ 1/10 (int8 input gradient)", "2501.02625", 0.1, True, left_hadamard),
    Claim("noise, searched ≤ no noise", "2211.16056", 1.0, True, searched_noise),
    Claim("noise and shift ≤ a zero point", "2211.16056", 1.0, False, noise_or_zero_point),
    Claim("dual rotation ≤ Hadamard (one 200 × channel)", "2406.01721", 1.0, False, dual_or_hadamard),
)  # fmt: skip
