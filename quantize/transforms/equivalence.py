"""The proof that a pass left the function as it was: the block before and after it, on two different inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from quantize.errors import QuantizeError
from quantize.graph.basis import Bases, Basis
from quantize.graph.interpreter import Overrides, Values, run_nodes
from quantize.graph.program import Program, Segment
from quantize.transforms.fold import Transform

TOLERANCE = 1e-5  # of the largest output, in float32: rounding makes about 1e-6
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
    """Largest relative difference of a segment's outputs, max |a - b| / max |b| over outputs and inputs.

    Args:
        before, after: what the segment runs with on either side of the pass.
        probes: two different inputs, as values alive in front of the segment, in the coordinates before the pass.
        bases: the analysis the pass acted on.
        sites: the transforms of the pass; values they act on are transformed before they are compared.
    """
    worst = 0.0
    for probe in probes:
        expected, found = dict(probe), in_coordinates(probe, bases, sites)
        run_nodes(program, segment.nodes, expected, before)
        run_nodes(program, segment.nodes, found, after)
        expected = in_coordinates(expected, bases, sites)
        worst = max(
            [worst, *(relative(found[n], expected[n]) for n in expected if n not in probe and floating(expected[n]))]
        )
    return worst


def floating(value: Any) -> bool:
    """Whether a value is a tensor of floating point."""
    return isinstance(value, Tensor) and value.is_floating_point()


def relative(a: Tensor, b: Tensor) -> float:
    """Max |a - b| / max |b|; infinite where either is not finite, 0 where there is nothing to compare."""
    if not b.numel():
        return 0.0
    ratio = float((a - b).abs().max() / b.abs().max().clamp(min=torch.finfo(b.dtype).tiny))
    return ratio if ratio == ratio else float("inf")


def in_coordinates(values: Values, bases: Bases, sites: Sites, invert: bool = False) -> Values:
    """Values with each transform applied (or undone) to those that live on its basis."""
    result = dict(values)
    for node in (n for n in values if n in bases.at):
        for basis, transform in sites.items():
            index = bases.at[node].of(basis)
            if index is not None:
                side = transform.invert if invert else transform.apply
                result[node] = on_channels(result[node], bases.at[node].axes, index, side)
    return result


def on_channels(x: Tensor, axes: tuple[int, ...], index: Tensor, side: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply `side` to the channels at index [copies, dim] along some axes of a value, counted through."""
    last = tuple(range(-len(axes), 0))
    moved = x.movedim(axes, last)
    rows = moved.flatten(-len(axes)).double()
    for copy in index:
        rows[..., copy] = side(rows[..., copy])
    return rows.reshape(moved.shape).movedim(last, axes).to(x.dtype)


def require_equivalent(name: str, found: float, blame: Mapping[str, float], segment: Segment) -> None:
    """Stop the run where a pass changed the function.

    Raises:
        QuantizeError: names the pass, the block, the basis that alone differs most, and the difference.
    """
    if found <= TOLERANCE:
        return
    where = max(blame, key=blame.__getitem__, default="an online transform")
    raise QuantizeError(
        f"the pass `{name}` changes the function of {segment.name}: at {where} the outputs differ by {found:.1e} "
        f"(allowed {TOLERANCE:.0e}); nothing was written, report this or leave the pass out of the recipe"
    )


def describe_basis(basis: Basis) -> str:
    """A basis by its first writer and reader."""
    ends = [edges[0].parameter for edges in (basis.writers, basis.readers) if edges]
    return f"basis {basis.index} ({' → '.join(ends)})"
