"""A pass must leave the function as it was: the block is run before and after it on two different inputs.

Activations that are thousands of times the others make float32's own rounding as large as a small mistake would be.
Where the difference in float32 is over the line, the comparison is therefore repeated in float64, with a finer line.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.fx.node import map_aggregate

from quantize.errors import QuantizeError
from quantize.graph.basis import Bases, Basis
from quantize.graph.interpreter import Overrides, Values, run_nodes
from quantize.graph.program import Program, Segment
from quantize.transforms.fold import Transform

TOLERANCE = 1e-5  # relative to the largest output; rounding of float32 makes about 1e-6
FLOAT64_TOLERANCE = 1e-9  # the same in float64; a fold that is right stays below 1e-12 times the cancellation
Sites = Mapping[Basis, Transform]


def max_relative_difference(
    program: Program,
    segment: Segment,
    before: Overrides,
    after: Overrides,
    probes: Sequence[Values],
    bases: Bases,
    sites: Sites,
) -> float:
    """Return the largest relative difference max |a - b| / max |b| of a segment's outputs, over outputs and inputs.

    Args:
        before, after: the parameters and linears that the segment runs with before and after the pass.
        probes: two different inputs, as the values in front of the segment in the coordinates before the pass.
        bases: the analysis that the pass acted on.
        sites: the transforms of the pass; they are undone in the values that are compared.
    """
    worst = 0.0
    for probe in probes:
        expected, found = dict(probe), in_coordinates(probe, bases, sites)
        run_nodes(program, segment.nodes, expected, before)
        run_nodes(program, segment.nodes, found, after)
        found = in_coordinates(found, bases, sites, invert=True)
        worst = max(
            [worst, *(relative(found[n], expected[n]) for n in expected if n not in probe and floating(expected[n]))]
        )
    return worst


def in_float64(segment: Segment, state: Overrides) -> Overrides:
    """Return overrides with which a segment computes in float64, casts to float32 in its graph included.

    The weights and the operands of its replaced linears must be float64 already.
    """

    def widen(run: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: run(*map_aggregate(args, widened), **map_aggregate(kwargs, widened))

    operators = {node: widen(node.target) for node in segment.nodes if callable(node.target)}
    return replace(state, operators=operators | dict(state.operators))


def widened(value: Any) -> Any:
    """Return float64 for float32, be it a tensor or the name of the dtype."""
    if value is torch.float32:
        return torch.float64
    return value.double() if isinstance(value, Tensor) and value.dtype == torch.float32 else value


def floating(value: Any) -> bool:
    """Return whether a value is a floating-point tensor."""
    return isinstance(value, Tensor) and value.is_floating_point()


def relative(a: Tensor, b: Tensor) -> float:
    """Return max |a - b| / max |b|; it is infinite if either is not finite, and 0 if there is nothing to compare."""
    if not b.numel():
        return 0.0
    a, b = (x if x.is_floating_point() else x.double() for x in (a, b))
    ratio = float((a - b).abs().max() / b.abs().max().clamp(min=torch.finfo(b.dtype).tiny))
    return ratio if ratio == ratio else float("inf")


def in_coordinates(values: Values, bases: Bases, sites: Sites, invert: bool = False) -> Values:
    """Apply each transform to the values that live on its basis, or undo it."""
    result = dict(values)
    for node in (n for n in values if n in bases.at):
        for basis, transform in sites.items():
            index = bases.at[node].of(basis)
            if index is not None:
                side = transform.invert if invert else transform.apply
                result[node] = on_channels(result[node], bases.at[node].axes, index, side)
    return result


def on_channels(x: Tensor, axes: tuple[int, ...], index: Tensor, side: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply `side` to the channels at index [copies, dim] along some axes of a value, taken as one flattened axis."""
    last = tuple(range(-len(axes), 0))
    moved = x.movedim(axes, last)
    rows = moved.flatten(-len(axes)).to(torch.float64, copy=True)
    for copy in index.to(x.device):
        rows[..., copy] = side(rows[..., copy])
    return rows.reshape(moved.shape).movedim(last, axes).to(x.dtype)


def require_equivalent(name: str, found: float, allowed: float, blame: Mapping[str, float], segment: Segment) -> None:
    """Stop the run if a pass changed the function.

    Raises:
        QuantizeError: it did; the message names the pass, the block, the basis that differs most and the difference.
    """
    if found <= allowed:
        return
    where = max(blame, key=blame.__getitem__, default="an online transform")
    raise QuantizeError(
        f"the pass `{name}` changes the function of {segment.name}: at {where} the outputs differ by {found:.1e} "
        f"(allowed {allowed:.0e}); report this or leave the pass out of the recipe"
    )


def describe_basis(basis: Basis) -> str:
    """Return a name for a basis, made of its first writer and reader."""
    ends = [edges[0].parameter for edges in (basis.writers, basis.readers) if edges]
    return f"basis {basis.index} ({' → '.join(ends)})"
