"""Plots of a run's figures as SVG with the text as text, in colours that are read on a dark page and a light one."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from quantize.artifact.report.findings import BlockRecord, Errors, InputRecord, Stage
from quantize.graph.alike_bases import anonymous

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#0f0e0d"  # stands for the colour of the page's text
COLOURS = ("#8a8a8a", "#d9632a", "#2f7fd0", "#2e9a5b", "#b350a8", "#c79a1b", "#3aa6a6", "#cc4b5c")
WIDTH = 4.0  # inches: as wide as a telephone shows at the size of its own text
ERROR = "relative error"  # never in decades, since it is 0 in front of the first block
SPAN = 20.0  # from the smallest to the largest number, beyond which an axis is in decades
MOST_KINDS = 6  # of inputs that get a plot, and of linears that get a line
STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 9,
    "svg.fonttype": "none",
    "svg.hashsalt": "quantize-model",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.titlesize": 9,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "text.color": INK,
    "text.parse_math": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "lines.linewidth": 1.4,
    "legend.frameon": False,
    "legend.fontsize": 8,
}
Lines = Mapping[str, Sequence[float]]


def block_errors(blocks: Mapping[str, BlockRecord]) -> str:
    """Return a plot of the error behind each block, by plain rounding and as quantized; '' without blocks."""
    lines = {
        "plain rounding": [x.plain_rounding for x in blocks.values()],
        "as quantized": [x.quantized for x in blocks.values()],
    }
    return plot([("", lines)], "blocks", ERROR) if blocks else ""


def massive_activations(blocks: Mapping[str, BlockRecord]) -> str:
    """Return a plot of the largest and the median magnitude behind each block; '' without blocks.

    Lines of the coordinates that the passes made are left out where they would hide those of the float model.
    """
    lines = {
        "largest, float model": [x.largest for x in blocks.values()],
        "largest, transformed": [x.transformed_largest for x in blocks.values()],
        "median, float model": [x.median for x in blocks.values()],
        "median, transformed": [x.transformed_median for x in blocks.values()],
    }
    changed = {
        name: not alike(line, lines[name.replace("transformed", "float model")]) or "float" in name
        for name, line in lines.items()
    }
    return (
        plot([("", {n: x for n, x in lines.items() if changed[n]})], "blocks", "magnitude", [*lines]) if blocks else ""
    )


def linear_errors(linears: Mapping[str, Errors]) -> str:
    """Return plots of the errors of linears alike in every layer, those of the largest errors first; '' without any."""
    kinds: dict[str, list[Errors]] = {}
    for path, found in linears.items():
        kinds.setdefault(anonymous(path), []).append(found)
    worst = sorted(kinds, key=lambda kind: -sum(x.quantized for x in kinds[kind]) / len(kinds[kind]))[:MOST_KINDS]
    plots = [
        (
            leaf(kind),
            {
                "rounded to nearest": [x.plain_rounding for x in kinds[kind]],
                "as quantized": [x.quantized for x in kinds[kind]],
            },
        )
        for kind in worst
    ]
    return plot(plots, "layers", ERROR) if plots else ""


def kurtosis_by_pass(inputs: Mapping[str, InputRecord]) -> str:
    """Return plots of the kurtosis of linears' inputs after each pass, for inputs alike in every layer; '' without."""
    kinds: dict[str, list[InputRecord]] = {}
    for path, found in inputs.items():
        kinds.setdefault(anonymous(path), []).append(found)
    peaks = {kind: max(x.stages[0].kurtosis for x in found) for kind, found in kinds.items()}
    highest = sorted(kinds, key=lambda kind: -peaks[kind])[:MOST_KINDS]
    plots = [(", ".join(map(leaf, kinds[kind][0].linears[:3])), by_stage(kinds[kind])) for kind in highest]
    order = dict.fromkeys(name_of(stage) for found in inputs.values() for stage in found.stages)
    return plot(plots, "layers", "kurtosis", [*order]) if plots else ""


def by_stage(inputs: Sequence[InputRecord]) -> dict[str, list[float]]:
    """Return for each stage the kurtosis in each layer, without stages that change none by a hundredth.

    Where a stage left a layer as it was, it has the figure of the stage before.
    """
    names = dict.fromkeys(name_of(stage) for found in inputs for stage in found.stages)
    lines: dict[str, list[float]] = {}
    for name in names:
        before = list(lines.values())[-1] if lines else [0.0] * len(inputs)
        own = [{name_of(stage): stage.kurtosis for stage in found.stages}.get(name) for found in inputs]
        line = [old if new is None else new for old, new in zip(before, own, strict=True)]
        if not alike(line, before):
            lines[name] = line
    return lines


def alike(line: Sequence[float], other: Sequence[float]) -> bool:
    """Return whether no number of a line differs by a hundredth from the other's."""
    return all(math.isclose(x, y, rel_tol=0.01) for x, y in zip(line, other, strict=True))


def name_of(stage: Stage) -> str:
    """Return the name of a stage as people read it."""
    return "float model" if stage.stage == "float" else stage.stage


def expert_tokens(tokens: Mapping[str, Sequence[int]]) -> str:
    """Return a plot of how the calibration tokens fall on each layer's experts; '' without experts."""
    kinds = {anonymous(path): path for path in tokens}
    first = [path for path in tokens if anonymous(path) == next(iter(kinds))]
    ordered = [sorted(tokens[path]) for path in first if tokens[path]]
    lines = {
        "most": [x[-1] for x in ordered],
        "median": [x[len(x) // 2] for x in ordered],
        "fewest": [x[0] for x in ordered],
    }
    return plot([("", lines)], "layers", "tokens of an expert") if ordered else ""


def plot(plots: Sequence[tuple[str, Lines]], across: str, up: str, order: Sequence[str] = ()) -> str:
    """Return plots side by side, two in a row, each with a title and lines by name over 0, 1, 2 and so on.

    Names take their colours in `order`, and others behind these. Plots of fewer than two numbers a line are left out,
    since they are no curve; '' if none is left.
    """
    plots = [(title, lines) for title, lines in plots if max(map(len, lines.values()), default=0) > 1]
    if not plots:
        return ""
    from matplotlib import rc_context, rcParamsDefault
    from matplotlib.figure import Figure

    drawn = dict.fromkeys(name for _, lines in plots for name in lines)
    names = [name for name in dict.fromkeys([*order, *drawn]) if name in drawn]
    colours = dict(zip(names, COLOURS * len(names), strict=False))
    columns = min(2, len(plots))
    rows = -(-len(plots) // columns)
    top, bottom, apart = 0.19 * -(-len(names) // 2) + 0.35, 0.5, 0.55  # inches
    each = 2.0 if rows == 1 else 1.1
    height = top + rows * each + (rows - 1) * apart + bottom
    with rc_context({**rcParamsDefault, **STYLE}):
        figure = Figure(figsize=(WIDTH, height))
        for number, (title, lines) in enumerate(plots, 1):
            draw(figure.add_subplot(rows, columns, number), title, lines, colours, up != ERROR)
        figure.subplots_adjust(
            left=0.75 / WIDTH,
            right=0.98,
            top=1 - top / height,
            bottom=bottom / height,
            hspace=apart / each,
            wspace=0.35,
        )
        figure.supxlabel(across, fontsize=9, y=0.05 / height)
        figure.supylabel(up, fontsize=9, x=0.05 / WIDTH)
        handles = {
            name: line for axes in figure.axes for line, name in zip(*axes.get_legend_handles_labels(), strict=True)
        }
        figure.legend([handles[name] for name in names], names, loc="upper left", ncols=2)
        return as_svg(figure)


def draw(axes: Axes, title: str, lines: Lines, colours: Mapping[str, str], wide: bool) -> None:
    """Draw lines over 0, 1, 2, …, with a marker at each number if there are few.

    A `wide` axis is in decades if the numbers span some.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    positive = [x for values in lines.values() for x in values if 0 < x < math.inf]
    decades = wide and bool(positive) and max(positive) > SPAN * min(positive)
    for name, values in lines.items():
        shown = [x if math.isfinite(x) and (x > 0 or not decades) else math.nan for x in values]
        axes.plot(shown, label=name, color=colours[name], marker="o" if len(shown) < 16 else None, markersize=3)
    if decades:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(numticks=5))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.set_ylim(0, 1.05 * max(positive, default=1.0))
        axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.6g}"))
    axes.set_title(title, loc="left")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))


def as_svg(figure: Figure) -> str:
    """Return a figure as an `<svg>` element that is as wide as its place and takes the colour of the text around it."""
    written, nothing = io.StringIO(), dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(written, format="svg", metadata=nothing)
    content = written.getvalue()
    element = content[content.index("<svg") :].replace(INK, "currentColor")
    return re.sub(r'^<svg([^>]*?) width="[^"]*"', r"<svg\1", re.sub(r'^(<svg[^>]*?) height="[^"]*"', r"\1", element))


def leaf(path: str) -> str:
    """Return the last part of a path."""
    return path.rpartition(".")[2]
