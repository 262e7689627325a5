"""Claims of papers that synthetic data cannot decide are measured on books-llama-6m and two windows of unseen text.

Where a method works while a model trains, what is claimed of the trained model is listed as not measured.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

from benchmarks.claims import sparsity, variance
from benchmarks.claims.claim import Claim, Measure, NotMeasured
from benchmarks.claims.small_model import BOOKS, load, weights, windows
from quantize.calibration.data import BUNDLED
from quantize.eval.bit_flips import clipped, losses, profile
from quantize.eval.perplexity import score_language
from quantize.eval.report import kind_of

RATE = 1e-5  # of bits that are wrong


@functools.cache
def damage(clip: str) -> float:
    """Return how much the loss of the bfloat16 model grows with wrong bits, over three seeds, with a way to clip."""
    model, paths = load(BOOKS), list(weights())
    bounds = profile(model, paths, windows(text=BUNDLED, count=8))
    with clipped(model, bounds, clip):
        found = losses(model, paths, False, windows(), RATE, math.log(kind_of(model)[1]))
    return sum(found) / len(found) - score_language(model, windows()).loss


def clipping(left: str, right: str) -> Measure:
    """Compare two ways to clip under wrong bits."""
    return lambda: (damage(left), damage(right))


def mixed_error() -> tuple[float, float]:
    """Return the output errors of R-Sparse's mix at half the budget, and of the better of its ends."""
    ends = (sparsity.mean_error(0.5, method) for method in ("scored", "rank"))
    return sparsity.mean_error(0.5, "mixed"), min(ends)


def mixed_loss() -> tuple[float, float]:
    """Return the increases of the loss of the mix at half the budget, and of channels alone by their magnitude."""
    return sparsity.increase(0.5, "mixed"), sparsity.increase(0.5, "magnitude")


def scored_loss() -> tuple[float, float]:
    """Return the increases of the loss with channels chosen by |x| ‖w‖ and by |x|."""
    return sparsity.increase(0.5, "scored"), sparsity.increase(0.5, "magnitude")


CLAIMS: Sequence[Claim] = (
    Claim(
        "FT-ClipAct: results beyond bounds to 0 ≤ 1/10 (1e-5 of bfloat16 bits wrong)", "1912.00941", 0.1, True,
        clipping("zero", "none"),
    ),
    Claim("Ranger: results clamped ≤ 1/10 (the same)", "2003.13874", 0.1, False, clipping("clamp", "none")),
    Claim("FT-ClipAct's zero < Ranger's clamp (the same)", "1912.00941", 0.5, True, clipping("zero", "clamp")),
    Claim(
        "FitAct's bounds by channel < one for each linear (the same, not trained)", "2112.13544", 0.9, False,
        clipping("zero by channel", "zero"),
    ),
    Claim("bounds in front of linears ≤ ½ (the same)", "ours", 0.5, False, clipping("zero in front", "none")),
    Claim("R-Sparse: a mix < both ends (50 %, output error)", "2504.19449", 0.97, True, mixed_error),
    Claim("R-Sparse: a mix < magnitude (50 %, loss)", "2504.19449", 0.9, True, mixed_loss),
    Claim("channels by R-Sparse's score < by magnitude (50 %, loss)", "2504.19449", 1.0, False, scored_loss),
    Claim("TVR's step on a trained model lowers its 4-bit error", "2503.17500", 0.99, False, variance.errors),
    Claim("TVR's step on a trained model leaves its loss", "2503.17500", 1.01, False, variance.losses),
)  # fmt: skip

NOT_MEASURED: Sequence[NotMeasured] = (
    NotMeasured(
        "LIR, TVR: fewer extreme activations, up to +4.6 % downstream (1B Llama)", "2503.17500",
        "works while a model trains, and none is trained here",
    ),
    NotMeasured(
        "FitAct, ProAct: bounds that are trained keep accuracy under more wrong bits", "2112.13544, 2406.06313",
        "bounds are trained on labels after profiling, and none are trained here",
    ),
    NotMeasured(
        "INSTA-BNN: +3.0 % and +2.8 % ImageNet top-1 (binary ResNet-18, MobileNetV1)", "2204.07439",
        "weights and thresholds of one bit are trained from scratch; no format here has one bit",
    ),
    NotMeasured(
        "approximated activations cost aligned models refusals", "2502.00840",
        "needs harmful prompts, a judge, and a model that refuses; `eval --drift` shows how margins move",
    ),
)  # fmt: skip
