"""What share of a model's body is quantized, and why the rest stays in floating point.

The body is every parameter but those of the tables of words and of the linear that scores the vocabulary.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx

from quantize.graph.linears import STACK, VIEWS
from quantize.graph.program import MOVES, Program
from quantize.graph.rules.table import name_of

NO_LINEAR = "no weight of a linear"
TABLE = "a table of rows that are looked up"
NOT_FOUND = "only plain linears are found in a model that cannot be exported"
TURNS = {"t", "numpy_T", "permute", "unsqueeze", "squeeze", "to", "_to_copy"}  # of a parameter as a whole
ENOUGH = 0.8  # the share of the body below which a run warns
PRODUCTS = {"linear", "matmul", "mm", "bmm", "addmm", "baddbmm"}
NAMED = 3  # parameters that are named where nothing is left to quantize
SMALL = 0.01  # the share of the body below which what stays in floating point is not named


def reasons_in_float(program: Program) -> dict[str, str]:
    """Return for each parameter why it stays in floating point, unless a quantized linear can stand in for it."""
    reading = {name: list(consumers(node)) for node, name in program.parameters.items()}
    given = " and ".join(f"`{name}`" for name in program.inputs)
    found = dict[str, str]()
    for node, name in program.parameters.items():
        if not reading[name]:
            tied = next((other for other in program.ties.get(name, ()) if reading.get(other)), None)
            found[name] = f"a pass with {given} alone does not reach it"
            found[name] = f"a copy of {tied}, to which it is tied" if tied else found[name]
            if program.export_error:
                found[name] = TABLE if name in program.embeddings else NOT_FOUND
        elif program.not_replaceable.get(name, STACK) != STACK:
            found[name] = program.not_replaceable[name]
        elif sum(size > 1 for size in node.meta["val"].shape) < 2:
            found[name] = NO_LINEAR
        else:
            operator = name_of(reading[name][0])
            as_none = "in a way that no linear does" if operator in PRODUCTS else "which is no linear"
            found[name] = f"`{operator}` reads it, {as_none}"
    return found


def nothing_left(program: Program, reasons: Mapping[str, str]) -> str:
    """Say that no linear is left to quantize, and what the largest parameters are instead."""
    sizes = {name: node.meta["val"].numel() for node, name in program.parameters.items() if name in reasons}
    largest = sorted(sizes, key=lambda name: (-sizes[name], name))[:NAMED]
    what = ", ".join(f"{name} ({reasons[name]})" for name in largest) or "none"
    return (
        f"no linear is left to quantize; the largest parameters are {what}; name fewer in ignore or more in targets, "
        "or give a model with linears"
    )


def consumers(node: fx.Node) -> Iterator[fx.Node]:
    """Yield the nodes that compute with a parameter, behind those that only take it apart or turn it around."""
    for user in node.users:
        if user.target in VIEWS | MOVES or name_of(user) in TURNS:
            yield from consumers(user)
        elif user.op != "output":
            yield user


@dataclass(frozen=True)
class Body:
    """How many of the body's parameters are quantized, and what is not.

    Attributes:
        parameters, quantized: the numbers of numbers.
        left: for each reason the parameters that stay in floating point with their sizes, the largest first.
    """

    parameters: int
    quantized: int
    left: Mapping[str, Mapping[str, int]]

    @classmethod
    def of(cls, program: Program, skipped: Mapping[str, str], apart: Collection[str]) -> Body:
        """Count what is in the body.

        Args:
            program: the program.
            skipped: the parameters that are not quantized, each with the reason.
            apart: the names of the tables of words and of the parameters that score the vocabulary.
        """
        sizes, left = dict[str, int](), defaultdict[str, dict[str, int]](dict)
        for node, name in program.parameters.items():
            if not set(program.ties.get(name, (name,))) & (sizes.keys() | apart):
                sizes[name] = node.meta["val"].numel()
        for name in sorted(sizes.keys() & skipped.keys(), key=lambda name: (-sizes[name], name)):
            left[skipped[name]][name] = sizes[name]
        done = sum(size for name, size in sizes.items() if name not in skipped)
        return cls(sum(sizes.values()), done, dict(sorted(left.items(), key=lambda item: -sum(item[1].values()))))

    @property
    def share(self) -> float:
        """The share of the body's parameters that is quantized."""
        return self.quantized / max(1, self.parameters)

    def lines(self) -> list[str]:
        """Return a line for each reason that keeps a good part of the body in floating point, the largest first."""
        lines = []
        for reason, found in self.left.items():
            share, (largest, *others) = sum(found.values()) / self.parameters, found
            more = f" and {len(others)} more" if others else ""
            lines += [f"{share:.1%} of the body stays in floating point: {largest}{more} ({reason})"] * (share >= SMALL)
        return ([self.warning] if self.warning else []) + lines

    @property
    def warning(self) -> str:
        """A sentence if much of the body is not quantized, or ''."""
        return "" if self.share >= ENOUGH else f"warning: only {self.share:.1%} of the body's parameters are quantized"

    def record(self) -> dict[str, Any]:
        """Return plain data for the manifest."""
        left = [
            {"reason": why, "parameters": sum(found.values()), "tensors": len(found), "largest": next(iter(found))}
            for why, found in self.left.items()
        ]
        return {"parameters": self.parameters, "quantized": self.quantized, "left": left}
