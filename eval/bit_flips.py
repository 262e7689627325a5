"""A campaign of bit flips: the loss of a model with random wrong bits in its stored weights, with and without clipping.

Memory that fails, or that somebody makes fail, turns single bits. In a float one bit of the exponent makes a weight
10^38 times as large; a 4-bit code stays on its grid whatever bit turns. FT-ClipAct sets results of layers that are
beyond what was profiled to zero (arXiv 1912.00941), Ranger clamps them (arXiv 2003.13874). FT-ClipAct goes on to search
lower thresholds by the accuracy under faults, which is not done here: its first ones, the largest values profiled, are
kept. FitAct has a bound for each neuron (arXiv 2112.13544), which it then trains; here it is the largest value, too.
These papers bound the results of ReLU, from 0 to T. Bounding the results of linears, which have signs, from -T to
T, is this project's reading. Bounds in front of linears are measured, too, and do nothing: what a wrong weight makes is
added to the residual stream, behind which norms hide it or make it no number.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

from quantize.calibration.data import BUNDLED, read_samples
from quantize.checkpoint.paths import folder_of
from quantize.checkpoint.tokenizer import load_tokenize
from quantize.errors import UsageError
from quantize.eval.loading import load_any
from quantize.eval.perplexity import score_language
from quantize.eval.report import BATCH_TOKENS, check_kinds, kind_of
from quantize.nn.quantized_linear import QuantizedLinear
from quantize.scheme.scheme import Engine

PROFILED = 16  # windows of the bundled prose that bounds are taken from
SEEDS = 3
STORED = (torch.bfloat16, torch.float16)  # in which a weight may be stored whose values are held in float32
CLIPS = ("none", "zero in front", "zero", "clamp", "zero by channel")  # of inputs of linears, and else of their results
Bounds = Mapping[str, tuple[float, Tensor]]  # by path, in front of a linear, and behind it for each channel, [N]
LABELS = {"codes": False, "codes and scales": True}  # what turns in an artifact, and whether scales do


def flip_campaign(
    directory: Path,
    text: Path,
    rates: Sequence[float],
    against: str | None = None,
    seqlen: int = 256,
    nsamples: int | None = None,
    engine: Engine = "fake_quant",
    trust_remote_code: bool = False,
) -> list[dict[str, Any]]:
    """Measure a language model whose linears' weights have random bits turned.

    In an artifact bits turn in the codes of its linears, and then in their scales and zero points, too; in a float
    model in the weights of the same linears, in the narrowest of bfloat16, float16 and float32 that holds them exactly.

    Args:
        directory, text, against, seqlen, nsamples, engine, trust_remote_code: as for `evaluate` in `report.py`.
        rates: the parts of all bits that turn.

    Returns:
        A row for each `model` (`codes`, `codes and scales`, `float`), way to `clip`, and `rate`, with the `mean` and
        the `worst` loss over `SEEDS` seeds in nats per token. A loss counts at most as the logarithm of the vocabulary,
        which is that of a uniform guess.

    Raises:
        UsageError: the models are no language models, or have no linears whose bits could be turned.
    """
    model = load_any(directory, engine, trust_remote_code)
    reference = None if against is None else load_any(against, engine, trust_remote_code)
    predicts, vocabulary = kind_of(model)
    if not predicts:
        raise UsageError(f"{directory} is no language model, and --bit-flips is for these; leave it out")
    check_kinds(directory, model, against, reference, text)
    tokenize, size = load_tokenize(folder_of(directory)), BATCH_TOKENS // seqlen or 1
    given = [(BUNDLED, PROFILED), (text, nsamples)]
    profiled, batches = (
        [x["input_ids"] for x in read_samples(path, seqlen, count, tokenize, vocabulary).batches(size)]
        for path, count in given
    )
    paths, rows = linears(model), []
    if not paths:
        raise UsageError(f"{directory} has no linears whose bits could be turned; give an artifact or a float model")
    labels = LABELS if quantized(model) else {"float": False}
    runs = [(label, model, scales) for label, scales in labels.items()]
    for label, each, scales in runs + ([] if reference is None else [("float", reference, False)]):
        bounds = profile(each, paths, profiled)
        for clip in CLIPS:
            with clipped(each, bounds, clip):
                for rate in rates:
                    found = losses(each, paths, scales, batches, rate, math.log(vocabulary))
                    row = {"model": label, "clip": clip, "rate": rate, "mean": mean(found), "worst": max(found)}
                    rows.append(row)
    return rows


def losses(
    model: nn.Module, paths: Sequence[str], scales: bool, batches: Sequence[Tensor], rate: float, largest: float
) -> list[float]:
    """Return the loss for each seed, at most `largest`; at rate 0 there is one."""
    found = []
    for seed in range(SEEDS if rate else 1):
        with flipped(model, paths, scales, rate, torch.Generator().manual_seed(seed)):
            loss = score_language(model, batches).loss
            found.append(loss if loss < largest else largest)  # also what is not a number
    return found


def quantized(model: nn.Module) -> list[str]:
    """Return the paths of the quantized linears."""
    return [path for path, module in model.named_modules() if isinstance(module, QuantizedLinear)]


def linears(model: nn.Module) -> list[str]:
    """Return the paths of the quantized linears, or of those of a float model without the one that scores words."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return quantized(model) or [
        path for path, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head
    ]


def profile(model: nn.Module, paths: Sequence[str], batches: Sequence[Tensor]) -> Bounds:
    """Return the largest magnitudes of each linear's input, and of its result by channel, on ids, each batch [B, T]."""
    bounds = dict.fromkeys(paths, (0.0, torch.zeros(1)))

    def note(path: str, x: Tensor, y: Tensor) -> None:
        before, behind = bounds[path]
        bounds[path] = (max(before, float(x.abs().max())), torch.maximum(behind, y.abs().flatten(0, -2).amax(0)))

    with ExitStack() as hooks:
        for p in paths:
            hook = model.get_submodule(p).register_forward_hook(lambda _, x, y, p=p: note(p, x[0], y))
            hooks.enter_context(hook)
        score_language(model, batches)
    return bounds


@contextmanager
def clipped(model: nn.Module, bounds: Bounds, clip: str) -> Iterator[None]:
    """Clip what each linear takes or makes to its bound, in one of the ways of `CLIPS`, until the `with` block ends."""
    with ExitStack() as hooks:
        for path, (before, behind) in bounds.items():
            module = model.get_submodule(path)
            if clip == "zero in front":
                hooks.enter_context(module.register_forward_pre_hook(lambda _, x, T=before: (zeroed(x[0], T),)))
            elif clip == "clamp":
                T = float(behind.max())
                hooks.enter_context(module.register_forward_hook(lambda _, __, y, T=T: y.clamp(-T, T)))
            elif clip != "none":
                bound = behind if clip == "zero by channel" else behind.max()
                hooks.enter_context(module.register_forward_hook(lambda _, __, y, T=bound: zeroed(y, T)))
        yield


def zeroed(x: Tensor, bound: float | Tensor) -> Tensor:
    """Return x with 0 for what is beyond ±bound or is no number (FT-ClipAct's function, for both signs)."""
    return x.where(x.abs() <= bound, 0)


@contextmanager
def flipped(
    model: nn.Module, paths: Sequence[str], scales: bool, rate: float, generator: torch.Generator
) -> Iterator[None]:
    """Turn random bits of the linears' stored weights, and of scales if asked for, until the `with` block ends."""
    modules = [model.get_submodule(path) for path in paths]
    tensors = [tensor for module in modules for tensor in stored(module, scales)]
    kept = [tensor.clone() for tensor in tensors]
    try:
        put(modules, tensors, [flip_bits(narrowest(tensor), rate, generator) for tensor in tensors])
        yield
    finally:
        put(modules, tensors, kept)


def stored(module: nn.Module, scales: bool) -> list[Tensor]:
    """Return the codes of a quantized linear, with its scales and zero points if asked for; of another its weight."""
    if not isinstance(module, QuantizedLinear):
        return [module.weight.data]  # type: ignore[list-item]
    rest = (module.scale, module.zero_point, module.global_scale) if scales else ()
    return [module.qweight, *(x for x in rest if x is not None)]


def put(modules: Sequence[nn.Module], tensors: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Set tensors that `stored` returned, and drop what the modules made of them."""
    for tensor, new in zip(tensors, values, strict=True):
        tensor.copy_(new)
    for module in modules:
        if isinstance(module, QuantizedLinear):
            module.drop_laid_out()


def narrowest(x: Tensor) -> Tensor:
    """Return a tensor in the narrowest float type that holds it exactly; codes stay as they are."""
    if x.dtype != torch.float32:
        return x
    return next((x.to(dtype) for dtype in STORED if torch.equal(x.to(dtype).float(), x)), x)


def flip_bits(x: Tensor, rate: float, generator: torch.Generator) -> Tensor:
    """Return a copy of x in which each bit is turned with the probability `rate`."""
    octets = x.contiguous().view(torch.uint8).flatten()
    count = int(torch.poisson(torch.tensor(8.0 * len(octets) * rate, dtype=torch.float64), generator=generator))
    places = torch.randint(8 * len(octets), (count,), generator=generator).unique()
    bits = (1 << places % 8).to(torch.uint8)
    turned = octets ^ torch.zeros_like(octets).index_add_(0, places // 8, bits)
    return turned.view(x.dtype).view(x.shape)


def flips_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Return a table with a column for each rate, of mean losses with the worst in brackets."""
    at = {(row["model"], row["clip"], row["rate"]): f"{row['mean']:.4f} ({row['worst']:.4f})" for row in rows}
    rates = dict.fromkeys(row["rate"] for row in rows)
    table = Table("bits turned in", "clipped", *(f"{rate:g}" for rate in rates))
    for model, clip in dict.fromkeys((row["model"], row["clip"]) for row in rows):
        table.add_row(model, clip, *(at[model, clip, rate] for rate in rates))
    return table
