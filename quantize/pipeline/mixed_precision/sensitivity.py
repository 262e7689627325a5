"""What a small deviation behind a block costs is found by the gradient of the loss, from the last block to the first.

To second order KL(p ‖ q) of the outputs is ½ E (g · Δ)², where Δ is the deviation, and g the gradient of log p of a
token that is drawn from p (by the Fisher information; Martens 2014, arXiv 1412.1193). The error
‖y - y'‖² / ‖y'‖² of a model without a vocabulary is E (g · Δ)² for a normal direction of y. Tokens are taken to deviate
independently of each other, which leaves less noise than the whole row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from rich.console import Console
from torch import Tensor, fx

from quantize.graph.interpreter import Overrides, Values, run_node
from quantize.graph.program import Program, Segment
from quantize.pipeline.memory import trim_heap
from quantize.pipeline.progress import track
from quantize.transforms.equivalence import floating

DRAWS = 4  # of gradients for each row
Gradients = dict[fx.Node, Tensor]


def deviation(values: Values, expected: Values) -> Gradients:
    """Return what the floating-point values behind a block differ by, of those that it has changed.

    As those of all units are held, they go to the machine's memory, in 16 bits.
    """
    pairs = {node: (values[node], y) for node, y in expected.items() if floating(y)}
    return {node: (x - y).bfloat16().cpu() for node, (x, y) in pairs.items() if x is not y}


def on_host(values: Values) -> Values:
    """Return values of which all tensors are in the machine's memory, as those in front of all blocks are held."""
    return {node: x.cpu() if isinstance(x, Tensor) else x for node, x in values.items()}


def cost(found: Gradients, gradients: Sequence[Gradients]) -> float:
    """Return the mean of (g · Δ)² over draws of g, summed over tokens."""
    products = [(g[node] * x.to(g[node])).sum(-1) for g in gradients for node, x in found.items() if node in g]
    return sum(float(x.square().sum()) for x in products) / max(len(gradients), 1)


@torch.enable_grad()
def first_gradients(
    program: Program, segment: Segment, state: Overrides, start: Values, generator: torch.Generator
) -> list[Gradients]:
    """Return draws of the gradient of the outputs' loss by what the last block starts from."""
    leaves, values = tracked(program, segment, state, start)
    y: Tensor = values[program.output.all_input_nodes[0]]
    return [
        pulled(leaves, [y], [direction(y.detach(), program.vocabulary, generator)], last=n == DRAWS - 1)
        for n in range(DRAWS)
    ]


def gradients_behind(
    program: Program,
    found: list[list[Gradients]],
    starts: list[list[Values]],
    state: Callable[[Segment], Overrides],
    console: Console | None,
) -> Iterator[tuple[Segment, list[list[Gradients]]]]:
    """Yield the blocks before the last one, the last of them first, with draws of the gradient by what each hands on.

    Args:
        program: the program.
        found: for each row draws of the gradient by what the last block starts from.
        starts: for each block before that what it starts from, row by row; they are taken out.
        state: what a block runs with.
        console: where progress is shown.
    """
    for segment in track(program.segments[-2::-1], "gradients of", lambda s: s.name, console):
        yield segment, found
        own = state(segment)
        found = [earlier_gradients(program, segment, own, *pair) for pair in zip(starts.pop(), found, strict=True)]
        trim_heap()


@torch.enable_grad()
def earlier_gradients(
    program: Program, segment: Segment, state: Overrides, start: Values, gradients: Sequence[Gradients]
) -> list[Gradients]:
    """Return the gradients by what a block starts from, given those by what it hands on."""
    leaves, values = tracked(program, segment, state, start)
    found = list[Gradients]()
    for n, given in enumerate(gradients):
        nodes = [node for node in given if values[node].requires_grad]
        outputs, directions = [values[node] for node in nodes], [given[node] for node in nodes]
        found.append(pulled(leaves, outputs, directions, last=n == len(gradients) - 1))
    return found


def tracked(
    program: Program, segment: Segment, state: Overrides, start: Values
) -> tuple[dict[fx.Node, Tensor], Values]:
    """Run a block so that its values have gradients by the floating-point values that it starts from."""
    values = {node: x.to(program.device) if isinstance(x, Tensor) else x for node, x in start.items()}
    leaves = {node: x.detach().requires_grad_() for node, x in values.items() if floating(x)}
    values |= leaves
    for node in (n for n in segment.nodes if n not in program.turned_stacks):
        values[node] = run_node(program, node, values, state)
    return leaves, values


def pulled(
    leaves: Mapping[fx.Node, Tensor], outputs: Sequence[Tensor], directions: Sequence[Tensor], last: bool
) -> Gradients:
    """Return the gradients of Σ output · direction by the leaves that it depends on; the last call frees the graph."""
    if not leaves or not outputs:
        return {}
    found = torch.autograd.grad(outputs, list(leaves.values()), directions, retain_graph=not last, allow_unused=True)
    return {node: g for node, g in zip(leaves, found, strict=True) if g is not None}


def direction(y: Tensor, vocabulary: int, generator: torch.Generator) -> Tensor:
    """Return a random v like the outputs y, of which E (v · Δ)² is the loss of a deviation Δ of y."""
    if y.dim() == 3 and y.shape[-1] == vocabulary:
        p = y[0].softmax(-1)
        tokens = torch.multinomial(p.cpu(), 1, generator=generator).to(p.device)
        return (p.neg().scatter_add_(1, tokens, torch.ones_like(p[:, :1])) * math.sqrt(0.5))[None]
    normal = torch.randn(y.shape, generator=generator).to(y)
    return normal.div_(y.norm().clamp(min=torch.finfo(y.dtype).tiny))
