"""Rotate channel bases by random Hadamard matrices, offline where the graph allows it and online elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from quantize.calibration.statistics import Statistic
from quantize.fold import CentredRotation, Rotation, Transform
from quantize.graph.basis import Basis
from quantize.graph.group import Group
from quantize.linear import OnlineHadamard
from quantize.passes.base import PASSES, Pass


@PASSES.register("rotate")
class Rotate(Pass):
    """Spread outliers over all channels (QuaRot, Ashkboos et al. 2024, arXiv 2404.00456).

    Attributes:
        residual: rotate bases that run through the whole model.
        heads: rotate values within each head.
        online: a Hadamard transform in front of every quantized linear whose input no weight can rotate, and across
            heads in front of those that read rotated heads.
    """

    legal: ClassVar[Group] = Group.CENTRED_ORTHOGONAL
    residual: bool = True
    heads: bool = True
    online_hadamard: bool = True

    def acts_on(self, basis: Basis) -> bool:
        """Heads of values, or whole bases, as switched on."""
        if any(edge.dual for edge in basis.readers):
            return False  # queries and keys: nothing that is quantized gains
        return self.heads if basis.heads > 1 else self.residual

    def transform(
        self, basis: Basis, statistics: Mapping[str, Statistic], weights: Mapping[str, Tensor], seed: torch.Generator
    ) -> Transform:
        """T = diag(random signs) · (I ⊗ H), H as large as a head; where a norm takes the mean, one that keeps it."""
        del statistics, weights
        signs = torch.randint(0, 2, (basis.dim,), generator=seed).double() * 2 - 1
        kind = Rotation if Group.ORTHOGONAL in basis.group else CentredRotation
        return kind(signs, basis.dim // basis.heads)

    def online(self, basis: Basis | None, columns: int) -> OnlineHadamard | None:
        """The part of a full rotation that no weight absorbed."""
        if not self.online_hadamard:
            return None
        if basis is None or not self.sites((basis,)):
            return OnlineHadamard(columns)
        head_dim = basis.dim // basis.heads
        return OnlineHadamard(columns // head_dim, head_dim) if basis.heads > 1 else None
