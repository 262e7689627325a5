"""What a paper says, as an inequality that is measured here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

Measure = Callable[[], tuple[float, float]]


@dataclass(frozen=True)
class Claim:
    """`left ≤ factor · right`.

    Attributes:
        name: what is said, in words.
        paper: arXiv number, or where it appeared.
        factor: the margin.
        holds: whether it does here; a test holds it to that.
        measure: gives left and right.
    """

    name: str
    paper: str
    factor: float
    holds: bool
    measure: Measure

    def row(self) -> dict[str, str | float | bool]:
        """The claim with its figures, flat."""
        left, right = self.measure()
        figures = {"left": left, "right": right, "factor": self.factor, "holds": left <= self.factor * right}
        return {"claim": self.name, "paper": self.paper, **figures}
