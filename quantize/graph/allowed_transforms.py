"""Sets of the transforms that a channel basis admits."""

from __future__ import annotations

from enum import Flag


class AllowedTransforms(Flag):
    """The matrices T that may act on a basis. `A in B` means that B allows every A; `A & B` is what both allow.

    `CENTRED_ORTHOGONAL` are the orthogonal matrices with T 1 = 1, which keep the mean of the channels as well as their
    mean square; so a LayerNorm lets them through as it is.
    """

    NONE = 0
    CENTRED_ORTHOGONAL = 1
    ORTHOGONAL = 2 | CENTRED_ORTHOGONAL
    POSITIVE_DIAGONAL = 4
    DIAGONAL = 8 | POSITIVE_DIAGONAL
    LINEAR = ORTHOGONAL | DIAGONAL

    def __str__(self) -> str:
        """Return the name as in reports, such as `orthogonal`."""
        return (self.name or "none").lower()
