"""Weights that lie on a grid already, as training for 4 bits or an earlier rounding left them, keep their integers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from quantize.formats import get_format
from quantize.formats.integer import FLOAT16_BITS, float16_scale
from quantize.formats.qtensor import QTensor, cached_rows
from quantize.kernels.reference import integer_range
from quantize.quantizers.base import grouped
from quantize.scheme.scheme import WeightArgs

LEVELS = 16  # the most levels of a grid of integers that is looked for in weights of any dtype
LEAST = 8  # the most steps that the least weight of a group of more levels may have
ROUNDINGS = 2.5  # of a weight and of the largest one, from which the step is read, and of the step itself, in part
LEAST_SQUARES = 1.25  # their largest error is larger than the least possible one
SOME = 64  # groups of each weight by which a scale for the whole is found
TOPS, E4M3_LARGEST = (6.0, 4.0), 448.0  # E2M1 values; others differ from these by powers of two
FLOAT16 = 2.0**-11  # the relative difference that steps and zero points in float16 make
FLOAT32 = 2.0**-20  # the relative difference of numbers that were computed in float32 by different ways


def on_grid(W: Tensor, args: WeightArgs, dtype: torch.dtype, sharing: Sequence[Tensor] = ()) -> QTensor | None:
    """Return W [N, K] as it is on a grid of the format, or None if any group of it lies on none.

    Integers are looked for on grids of at most 16 levels, d · (q - z) with integers q and z, since finer ones can
    hardly be told from weights in 16 bits. Integers of more bits are also looked for on as many levels as they have,
    for which weights must be float32, as those of a source in 8 bits are. A weight of zeros alone lies on no grid.

    Args:
        W: float32.
        args: the format, and the groups that share a scale.
        dtype: the dtype in which W was stored, which moved each weight by half a unit in its last place at most. Scales
            are stored in it, too.
        sharing: W and the others on grids that multiply the same input, which share a scale for whole weights.
    """
    size = args.group_size or W.shape[1]
    if W.shape[1] % size or not bool(W.any()):
        return None
    number_format, tolerance = get_format(args.format), ROUNDINGS * torch.finfo(dtype).eps / 2
    global_scale = None
    if number_format.has_global_scale:
        global_scale = whole_scale(sharing or [W], args, dtype, tolerance) or whole_scale([W], args, dtype, tolerance)
        if global_scale is None:
            return None
    parts = []
    for part in W.split(cached_rows(W)):
        groups = grouped(part, args).flatten(0, 1)
        if number_format.element == "int":
            found = on_integers(groups, args, tolerance)
        elif number_format.zero_point_dtype.is_floating_point:
            found = on_levels(groups, args, dtype)
        else:
            found = on_format(groups, args, dtype, global_scale, max(tolerance, FLOAT32))
        if found is None:
            return None
        values, scale, zero_point = found
        parts.append((values.view_as(part), *(x.view(len(part), -1) for x in (scale, zero_point))))
    values, scale, zero_point = (torch.cat(pieces) for pieces in zip(*parts, strict=True))
    if args.scale_dtype is not None:
        scale = in_float16(scale.to(dtype).float(), zero_point, args.num_bits)
    stored = number_format.encode_scale(scale, global_scale, dtype)
    if not bool((number_format.decode_scale(stored, global_scale) != 0).all()):
        return None
    return QTensor.pack(values, stored, None if args.symmetric else zero_point, args, global_scale)


def on_integers(x: Tensor, args: WeightArgs, tolerance: float) -> tuple[Tensor, Tensor, Tensor] | None:
    """Return integers, scales [n] and zero points [n] of groups x [n, size]; None if one of them has none.

    Zero is a level of every grid. Scales are positive, unless only a negative one fits. The coarsest grid is taken,
    which has the fewest levels between the ends.
    """
    lowest, highest = integer_range(args.num_bits)
    low, high = x.amin(-1).clamp(max=0), x.amax(-1).clamp(min=0)
    peak = x.gather(-1, x.abs().argmax(-1, keepdim=True))
    k, scale = torch.zeros_like(x), torch.ones_like(low)
    live = (high > low).nonzero()[:, 0]
    least = x.abs().where(x != 0, torch.inf).amin(-1, keepdim=True)
    for steps in range(1, LEAST + 1) if highest - lowest >= LEVELS else ():
        t, d = x[live], least[live] / steps
        q = (t / d).round()
        hits = ((t - q * d).abs() <= FLOAT32 * t.abs()).all(-1)
        hits &= q.amax(-1).clamp(min=0) - q.amin(-1).clamp(max=0) <= highest - lowest
        k[live[hits]], scale[live[hits]] = q[hits], fitted(t[hits], q[hits], d[hits])
        live = live[~hits]
    for steps in range(1, LEVELS):
        if not len(live):
            break
        t, top = x[live], peak[live]
        number = (top / ((high - low)[live, None] / steps)).round()
        d = top / torch.where(number == 0, 1, number)
        q = (t / d).round()
        span = q.amax(-1).clamp(min=0) - q.amin(-1).clamp(max=0)
        hits = ((t - q * d).abs() <= tolerance * t.abs()).all(-1) & (number[:, 0] != 0) & (span == steps)
        k[live[hits]], scale[live[hits]] = q[hits], fitted(t[hits], q[hits], d[hits])
        live = live[~hits]
    zero_point = torch.zeros_like(low)
    if not args.symmetric:  # the one nearest to 0
        zero_point = torch.minimum(torch.maximum(zero_point, lowest - k.amin(-1)), highest - k.amax(-1))
    signs = get_format(args.format).scale_signs(k.amin(-1), k.amax(-1), args)
    if signs is not None:
        signs = torch.where(k.amax(-1) > highest, signs, 1.0)
        k, scale = k * signs[:, None], scale * signs
    q = k + zero_point[:, None]
    if len(live) or float(q.min()) < lowest or float(q.max()) > highest:
        return None
    return q, scale, zero_point


def on_levels(x: Tensor, args: WeightArgs, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor] | None:
    """Return what `on_integers` returns, for 16 equally spaced levels from the least to the largest weight of a group.

    What computed a weight in few bits rounded it relative to the largest one of its group, so that this one tells what
    may be wrong. The step and the zero point are those of least error.
    """
    number_format, tolerance = get_format(args.format), max(LEAST_SQUARES * torch.finfo(dtype).eps / 2, FLOAT16)
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    scale, zero_point = number_format.compute_qparams(low, high, args, dtype, None)
    q = number_format.round(x / ((high - low) / (LEVELS - 1)).where(high > low, scale) + zero_point, args)
    spread, middle = q - q.mean(-1, keepdim=True), x.mean(-1, keepdim=True)
    least = (spread * x).sum(-1, keepdim=True) / spread.square().sum(-1, keepdim=True)
    scale = torch.where(least > 0, least, scale).half().float()  # NaN where all are equal
    zero_point = torch.where(least > 0, q.mean(-1, keepdim=True) - middle / scale, zero_point).half().float()
    allowed = tolerance * torch.maximum(low.abs(), high.abs())
    if not bool((((q - zero_point) * scale - x).abs() <= allowed).all()) or not bool((scale > 0).all()):
        return None
    return q, scale[:, 0], zero_point[:, 0]


def in_float16(scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """Return scales that float16 holds, and holds times their zero points: the nearest ones, or coarser ones."""
    nearest = scale.half().float()
    exact = (nearest * zero_point).half().float() == nearest * zero_point
    return torch.where(exact, nearest, float16_scale(scale, FLOAT16_BITS - bits))


def fitted(x: Tensor, q: Tensor, d: Tensor) -> Tensor:
    """Return the steps [n] of groups x [n, size] with integers q: d [n, 1] where it is exact, or of least error."""
    wide = q.double()
    least = (x * wide).sum(-1) / wide.square().sum(-1)
    return torch.where((q * d == x).all(-1), d[:, 0], least.float())


def whole_scale(weights: Sequence[Tensor], args: WeightArgs, dtype: torch.dtype, tolerance: float) -> Tensor | None:
    """Return a scale G float32 [] for whole weights [N, K] with which some of their groups lie on the grid, or None.

    The largest magnitude gives it, unless further weights had the same one, or the weights are parts of them. A group's
    scale is e · G, where e has four bits, and its largest value is 6 or 4, or half as much by any power of two, so that
    G is one of 16 times a power of two, which is the least that keeps every e in E4M3.
    """
    own, parts = get_format(args.format).global_scale(weights), [grouped(W, args).flatten(0, 1) for W in weights]
    groups = torch.cat([part[part.any(-1)][:SOME] for part in parts])
    largest, tops = torch.stack([W.abs().max() for W in weights]).max(), torch.tensor(TOPS, device=groups.device)
    units = groups[0].abs().max() / tops[:, None] / torch.arange(8, 16, device=groups.device)
    units *= (largest / (tops.min() * E4M3_LARGEST) / units).log2().ceil().exp2()
    for tried in (*([] if own is None else [own]), *units.flatten().unbind()):
        if on_format(groups, args, dtype, tried, max(tolerance, FLOAT32)) is not None:
            return tried.clone()
    return None


def on_format(
    x: Tensor, args: WeightArgs, dtype: torch.dtype, global_scale: Tensor | None, tolerance: float
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Return what `on_integers` returns, for the values of any format, by the scales that its search would try."""
    number_format = get_format(args.format)
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    values, scale = torch.zeros_like(x), torch.ones_like(low)
    live = torch.arange(len(x), device=x.device)
    for factor in (1.0, *number_format.scale_search):
        if not len(live):
            break
        t = x[live]
        tried, _ = number_format.compute_qparams(low[live] * factor, high[live] * factor, args, dtype, global_scale)
        found = number_format.round(t / tried, args)
        hits = ((t - found * tried).abs() <= tolerance * t.abs()).all(-1)
        values[live[hits]], scale[live[hits]] = found[hits], tried[hits]
        live = live[~hits]
    return None if len(live) else (values, scale[:, 0], torch.zeros_like(scale[:, 0]))
