"""Rotate channel bases by random Hadamard matrices, offline where the graph allows it and online elsewhere."""

from __future__ import annotations

from typing import ClassVar

import torch

from quantize.fold import CentredRotation, Rotation, Transform
from quantize.graph.basis import Basis
from quantize.graph.group import Group
from quantize.online import Front, hadamard
from quantize.passes.base import PASSES, Pass, Place, Site


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

    def transform(self, site: Site) -> Transform:
        """T = diag(random signs) · (I ⊗ H), H as large as a head; where a norm takes the mean, one that keeps it."""
        basis = site.basis
        signs = torch.randint(0, 2, (basis.dim,), generator=site.generator).double() * 2 - 1
        kind = Rotation if Group.ORTHOGONAL in basis.group else CentredRotation
        return kind(signs, basis.dim // basis.heads)

    def goes_online(self, basis: Basis | None, columns: int) -> bool:
        """Where no weight absorbs a full rotation."""
        del columns
        return self.online_hadamard and (basis is None or not self.sites((basis,)) or basis.heads > 1)

    def front(self, place: Place) -> Front:
        """The part of a full rotation that no weight absorbed."""
        basis, columns = place.basis, place.weight.shape[1]
        if basis is None or not self.sites((basis,)):
            return place.front.then(hadamard(columns))
        head_dim = basis.dim // basis.heads
        return place.front.then(hadamard(columns // head_dim, head_dim))
