"""Rotate channel bases by random Hadamard matrices, offline where the graph allows it and online elsewhere."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from pydantic import Field

from quantize.errors import UsageError
from quantize.formats import get_format
from quantize.graph.allowed_transforms import AllowedTransforms
from quantize.graph.basis import Basis
from quantize.passes.base import PASSES, BasisContext, LinearContext, Pass
from quantize.scheme.scheme import Scheme
from quantize.transforms.fold import CentredRotation, Rotation, Transform
from quantize.transforms.online import InputTransform, hadamard

AFTER_SEARCH = {
    "noisy_bias": "the bias was searched for inputs that are not rotated",
    "activation_clip": "the clipping was searched for inputs that are not rotated",
    "runtime_smooth": "it smooths what reaches the quantizer, so the rotation must be in front of it",
}


@PASSES.register("rotate")
class Rotate(Pass):
    """Spread outliers over all channels (QuaRot, Ashkboos et al. 2024, arXiv 2404.00456).

    Attributes:
        residual: whether to rotate bases that run through the whole model.
        heads: whether to rotate values within each head.
        online_hadamard: whether to put a Hadamard transform in front of every quantized linear whose input no weight
            can rotate, and one across heads in front of those that read rotated heads.
        block_size: the number of neighbouring channels that are mixed; 0 mixes all. If it does not divide the channels,
            their largest common divisor is taken. None takes what suits the format: 32 for MXFP4, all for integers.
            NVFP4's fine groups lose by rotation (`make bench-handlers`), so there a block size must be given.
        where_useful: whether to rotate only what plain rounding loses less behind, or hardly more, on two probes.
    """

    legal: ClassVar[AllowedTransforms] = AllowedTransforms.CENTRED_ORTHOGONAL
    never_after: ClassVar[Mapping[str, str]] = AFTER_SEARCH
    residual: bool = True
    heads: bool = True
    online_hadamard: bool = True
    block_size: int | None = Field(None, ge=0)
    where_useful: bool = False

    def check(self, scheme: Scheme) -> None:
        """Refuse a format that rotating makes worse, unless a block size is given."""
        number_format = get_format(scheme.weights.format)
        if number_format.rotation_block is None and self.block_size is None:
            raise UsageError(
                f"the pass `{self.name}` makes {number_format.name.upper()} worse, whose groups of "
                f"{number_format.group_size} follow outliers by themselves; leave it out, or give it a block_size"
            )

    def selects(self, basis: Basis) -> bool:
        """Return whether the recipe asks for this kind of basis: values within heads, or whole bases."""
        if any(edge.dual for edge in basis.readers):
            return False  # rotating queries and keys helps nothing that is quantized here
        return self.heads if basis.heads > 1 else self.residual

    def transform(self, context: BasisContext) -> Transform:
        """Return T = diag(random signs) · (I ⊗ H), H as large as a head; where a norm takes the mean, T keeps it."""
        basis = context.basis
        signs = torch.randint(0, 2, (basis.dim,), generator=context.generator).double() * 2 - 1
        kind = Rotation if AllowedTransforms.ORTHOGONAL in basis.allowed else CentredRotation
        return kind(signs, self.order(basis.dim // basis.heads, *context.reader_schemes.values()))

    def transforms_input(self, basis: Basis | None, columns: int) -> bool:
        """Return whether no weight absorbs a full rotation of what the linear reads."""
        del columns
        return self.online_hadamard and (self.unreached(basis) or (basis is not None and basis.heads > 1))

    def unreached(self, basis: Basis | None) -> bool:
        """Return whether no weight rotates what a linear reads."""
        return basis is None or not self.sites((basis,))

    def input_transform(self, context: LinearContext) -> InputTransform:
        """Return the input transform with the part of a full rotation that no weight absorbed."""
        basis, columns = context.basis, context.weight.shape[1]
        if basis is None or self.unreached(basis):
            return context.input_transform.append(hadamard(self.order(columns, context.scheme)))
        head_dim = basis.dim // basis.heads
        across = self.order(columns, context.scheme) // self.order(head_dim, context.scheme)
        return context.input_transform.append(hadamard(across, head_dim)) if across > 1 else context.input_transform

    def order(self, columns: int, *schemes: Scheme) -> int:
        """Return the number of channels that a rotation mixes, so that it suits all schemes that read them."""
        formats = [get_format(x.weights.format) for x in schemes] if self.block_size is None else []
        blocks = [found.rotation_block or 0 for found in formats]
        block = math.gcd(*blocks) if blocks else self.block_size or 0
        return math.gcd(columns, block) if block else columns
