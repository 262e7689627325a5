"""A paper's claim is an inequality, which is measured here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

Measure = Callable[[], tuple[float, float]]


@dataclass(frozen=True)
class Claim:
    """`left ≤ factor · right`.

    Attributes:
        name: the claim in words.
        paper: the arXiv number, or the place of publication.
        factor: the margin.
        holds: whether the claim holds here, which a test checks.
        measure: returns left and right.
    """

    name: str
    paper: str
    factor: float
    holds: bool
    measure: Measure

    def row(self) -> dict[str, str | float | bool]:
        """Return the claim with its figures, as a flat row."""
        left, right = self.measure()
        figures = {"left": left, "right": right, "factor": self.factor, "holds": left <= self.factor * right}
        return {"claim": self.name, "paper": self.paper, **figures}


@dataclass(frozen=True)
class NotMeasured:
    """A claim that is not measured here.

    Attributes:
        name, paper: as in `Claim`.
        reason: why it is not.
    """

    name: str
    paper: str
    reason: str

    def row(self) -> dict[str, str | float | bool]:
        """Return the claim without figures, as a flat row."""
        told = f"a claim only, not measured: {self.reason}"
        return {"claim": self.name, "paper": self.paper, "left": "", "right": "", "factor": "", "holds": told}
