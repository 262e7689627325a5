"""The transforms a channel basis admits, as sets."""

from __future__ import annotations

from enum import Flag


class Group(Flag):
    """Which matrices T may act on a basis; `A in B`: B allows every A; `A & B`: what both allow."""

    NONE = 0
    ORTHOGONAL = 1
    POSITIVE_DIAGONAL = 2
    DIAGONAL = 4 | POSITIVE_DIAGONAL
    LINEAR = ORTHOGONAL | DIAGONAL

    def __str__(self) -> str:
        """The group's name in reports, `orthogonal`."""
        return (self.name or "none").lower()
