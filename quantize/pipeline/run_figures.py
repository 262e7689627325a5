"""What a run's page shows: errors and outliers, block by block, on the rows that were held back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from quantize.calibration.massive import is_float
from quantize.calibration.runner import SequentialRunner
from quantize.graph.interpreter import Overrides, Values, value_of
from quantize.graph.linears import Linear
from quantize.graph.program import Program, Segment
from quantize.transforms.kurtosis import kurtosis

Figures = dict[str, float]


@dataclass
class RunFigures:
    """Figures of a run, as plain data.

    Attributes:
        blocks: block → `plain_rounding` and `quantized`, the root of the mean over tokens of ‖y - y'‖² / ‖y'‖² behind
            it; and `largest` and `median` of |y'|, and the same in the coordinates that the passes have made.
        linears: path → `plain_rounding` and `quantized`, the same for a linear's output if its transformed weight is
            rounded to nearest, and as it was rounded.
        inputs: the path of the first of the linears that share an input → `linears`, the names of all, and `stages`,
            the figures of the input in the float model and after each pass that changes the block.
    """

    blocks: dict[str, Figures] = field(default_factory=dict)
    linears: dict[str, Figures] = field(default_factory=dict)
    inputs: dict[str, dict[str, Any]] = field(default_factory=dict)

    def note_inputs(self, stage: str, found: Mapping[tuple[str, ...], Figures]) -> None:
        """Take in what `input_figures` returned after a pass, or for the float model."""
        for (first, *others), figures in found.items():
            entry = self.inputs.setdefault(first, {"linears": [first, *others], "stages": []})
            entry["stages"].append({"stage": stage, **figures})


def input_figures(
    program: Program,
    segment: Segment,
    state: Overrides,
    values: Values,
    hooks: Mapping[Linear, Callable[[Tensor], Tensor]],
) -> dict[tuple[str, ...], Figures]:
    """Return `kurtosis` (over the channels of a token, mean over tokens) and `largest` |x| of linears' inputs.

    Args:
        program, segment: the program, and the block that the linears are in.
        state: what the block runs with.
        values: one batch in front of the block.
        hooks: linear → what its input goes through before it counts.
    """
    ahead, found = SequentialRunner.of(program, [dict(values)]), dict[tuple[str, ...], Figures]()
    for sharing in ahead.advance_to_linears(segment, state, hooks, finish=False):
        source = value_of(program, sharing[0].source, ahead.values[0], state)
        x = hooks[sharing[0]](source).flatten(0, -2).double()
        if x.numel():
            paths = tuple(linear.path for linear in sharing)
            found[paths] = {"kurtosis": short(float(kurtosis(x).mean())), "largest": short(float(x.abs().max()))}
    return found


def hidden_state(program: Program, segment: Segment) -> fx.Node | None:
    """Return the largest floating-point value that a block hands on, which is its hidden state; None if there is none.

    A value of fewer than two axes or of one row is none, and so is one whose size only data decide.
    """
    inside = set(segment.nodes)
    later = [n for n in segment.nodes if n in program.last_use and program.last_use[n] not in inside and is_float(n)]
    later = [n for n in later if not free_unbacked_symbols(n.meta["val"])]
    return max((n for n in later if n.meta["val"].dim() > 1), key=lambda n: n.meta["val"].numel(), default=None)


class BlockFigures:
    """Sums over rows for the figures of one block."""

    def __init__(self) -> None:
        self.tokens, self.errors = 0, {"plain_rounding": 0.0, "quantized": 0.0}
        self.largest, self.medians = {"": 0.0, "transformed_": 0.0}, {"": 0.0, "transformed_": 0.0}

    def update(self, expected: Tensor, plain: Tensor, quantized: Tensor, transformed: Tensor) -> None:
        """Take in a row, each value [tokens, C]: of the float model, of plain rounding, and of the quantized model.

        `transformed` is the float model's value in the coordinates that the passes have made.
        """
        size = expected.double().square().sum(-1).clamp(min=1e-300)
        for name, y in (("plain_rounding", plain), ("quantized", quantized)):
            self.errors[name] += float(((y.double() - expected.double()).square().sum(-1) / size).sum())
        for name, y in (("", expected), ("transformed_", transformed)):
            self.largest[name] = max(self.largest[name], float(y.abs().max()))
            self.medians[name] += len(y) * float(y.abs().median())
        self.tokens += len(expected)

    def record(self) -> Figures:
        """Return the figures as `RunFigures.blocks` holds them."""
        found = {name: (error / self.tokens) ** 0.5 for name, error in self.errors.items()}
        found |= {f"{name}largest": value for name, value in self.largest.items()}
        found |= {f"{name}median": value / self.tokens for name, value in self.medians.items()}
        return {name: short(value) for name, value in found.items()}


def short(value: float) -> float:
    """Return a number with four digits, which is what a page can show."""
    return float(f"{value:.4g}")
