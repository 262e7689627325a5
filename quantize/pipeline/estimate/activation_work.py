"""What calibration activations take: their way through the model, statistics of them, their rounding, and files."""

from __future__ import annotations

from torch import fx

from quantize.calibration.spill import IN_MEMORY
from quantize.graph.shapes import ShapeInfo
from quantize.pipeline.estimate.memory import MemoryEstimate
from quantize.pipeline.estimate.work import Work, passes

GRID = 6  # passes that adding up a group takes
ROUNDED = 12  # passes over activations that are quantized
STATISTICS = 15  # passes over activations that a pass looks at
NODE = 24  # operators that calling one costs when a program calls it
FILED = 8  # passes over activations that are written to a file and read again
SOFTMAX = 33  # passes over the scores of attention


def calibration(found: MemoryEstimate) -> Work:
    """The calibration data once through the model."""
    batches = ((number, sizes) for number, sizes, _ in found.alive)
    nodes = (node_work(found, sizes, node).times(number) for number, sizes in batches for node in found.calibrated)
    return sum(nodes, filed(found))


def node_work(found: MemoryEstimate, sizes: ShapeInfo, node: fx.Node) -> Work:
    """One node's: its product, what it writes, and the call; linears in bfloat16 round what they take and give."""
    products, scores, made = sizes.multiply_adds(node), sizes.scores(node), sizes.bytes_written(node) / 4
    linear = bool(products and not scores)
    multiplied = rounded(found, products) if linear else Work(products, cached=SOFTMAX * scores)
    casts = 2 if linear and found.in_bfloat16 else 0
    return multiplied + passes((1 + casts) * made, made) + Work(operators=NODE)


def filed(found: MemoryEstimate) -> Work:
    """What finds no room in memory at each stop, and so is written to files and read again."""
    total = 0.0
    for segment in found.carrying:
        columns = (0, *(group[0].columns for group in found.together(segment)))
        kept = found.border_bytes(segment) / 4
        total += sum(max(0.0, kept + rows(found) * K - IN_MEMORY / 4) for K in columns)
    return Work(elements=FILED * total)


def rows(found: MemoryEstimate) -> int:
    """Tokens of all batches."""
    return sum(number * sizes.rows for number, sizes, _ in found.alive)


def rounded(found: MemoryEstimate, products: float) -> Work:
    """Products whose operands are rounded to bfloat16 where the model is calibrated in it."""
    return Work(rounded=products) if found.in_bfloat16 else Work(products)


def batched(found: MemoryEstimate, columns: int, times: float) -> Work:
    """All batches' activations of so many columns changed, batch by batch."""
    return sum((passes(number * s.rows * columns * times, s.rows * columns) for number, s, _ in found.alive), Work())


def looked_at(found: MemoryEstimate, K: int) -> Work:
    """The statistics of one input, for each pass that asks for some."""
    return batched(found, K, STATISTICS * sum(step.handler.needs is not None for step in found.plan.steps))


def quantized(found: MemoryEstimate, N: list[int], K: int) -> Work:
    """What quantized activations cost beside the product: their rounding, and adding up groups."""
    if found.plan.recipe.activations is None:
        return Work()
    groups = K // (found.plan.recipe.weights.group_size or K)
    inputs = batched(found, K, ROUNDED * (1 + found.plan.quantizer.needs_float_reference))
    return sum((batched(found, n, GRID * groups) for n in N), inputs)
