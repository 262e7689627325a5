"""Rotate channel bases by random Hadamard matrices, offline where the graph allows it and online elsewhere."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from pydantic import Field

from quantize.errors import UsageError
from quantize.graph.basis import Basis
from quantize.graph.transform_group import AllowedTransforms
from quantize.passes.base import PASSES, BasisContext, LinearContext, Pass
from quantize.recipe.scheme import Scheme
from quantize.transforms.fold import CentredRotation, Rotation, Transform
from quantize.transforms.online import InputTransform, hadamard

FORMAT_BLOCKS = {"mxfp4": 32}  # a group of its own scale (MR-GPTQ, arXiv 2509.23202, section 4)
AFTER_SEARCH = {
    "noisy_bias": "the bias was searched for inputs that are not rotated",
    "activation_clip": "the clipping was searched for inputs that are not rotated",
    "runtime_smooth": "it smooths what reaches the quantizer, so the rotation must be in front of it",
}


@PASSES.register("rotate")
class Rotate(Pass):
    """Spread outliers over all channels (QuaRot, Ashkboos et al. 2024, arXiv 2404.00456).

    Attributes:
        residual: rotate bases that run through the whole model.
        heads: rotate values within each head.
        online_hadamard: a Hadamard transform in front of every quantized linear whose input no weight can rotate, and
            across heads in front of those that read rotated heads.
        block_size: mix only so many neighbouring channels (where that divides them, else the largest common divisor),
            0 all of them; None is what suits the scheme's format: 32 for MXFP4, all for integers. NVFP4's fine groups
            lose by rotation (`make bench-handlers`), so there it must be asked for.
    """

    legal: ClassVar[AllowedTransforms] = AllowedTransforms.CENTRED_ORTHOGONAL
    never_after: ClassVar[Mapping[str, str]] = AFTER_SEARCH
    residual: bool = True
    heads: bool = True
    online_hadamard: bool = True
    block_size: int | None = Field(None, ge=0)

    def check(self, scheme: Scheme) -> None:
        """NVFP4 is refused unless a block size asks for it."""
        if scheme.weights.format == "nvfp4" and self.block_size is None:
            raise UsageError(
                f"the pass `{self.name}` makes NVFP4 worse, whose groups of 16 follow outliers by themselves; "
                "leave it out, or give it a block_size"
            )

    def selects(self, basis: Basis) -> bool:
        """Heads of values, or whole bases, as switched on."""
        if any(edge.dual for edge in basis.readers):
            return False  # queries and keys: nothing that is quantized gains
        return self.heads if basis.heads > 1 else self.residual

    def transform(self, context: BasisContext) -> Transform:
        """T = diag(random signs) · (I ⊗ H), H as large as a head; where a norm takes the mean, one that keeps it."""
        basis = context.basis
        signs = torch.randint(0, 2, (basis.dim,), generator=context.generator).double() * 2 - 1
        kind = Rotation if AllowedTransforms.ORTHOGONAL in basis.group else CentredRotation
        return kind(signs, self.order(basis.dim // basis.heads, *context.reader_schemes.values()))

    def transforms_input(self, basis: Basis | None, columns: int) -> bool:
        """Where no weight absorbs a full rotation."""
        del columns
        return self.online_hadamard and (self.unreached(basis) or (basis is not None and basis.heads > 1))

    def unreached(self, basis: Basis | None) -> bool:
        """Whether no weight rotates what a linear reads."""
        return basis is None or not self.sites((basis,))

    def input_transform(self, context: LinearContext) -> InputTransform:
        """The part of a full rotation that no weight absorbed."""
        basis, columns = context.basis, context.weight.shape[1]
        if basis is None or self.unreached(basis):
            return context.input_transform.append(hadamard(self.order(columns, context.scheme)))
        head_dim = basis.dim // basis.heads
        across = self.order(columns, context.scheme) // self.order(head_dim, context.scheme)
        return context.input_transform.append(hadamard(across, head_dim)) if across > 1 else context.input_transform

    def order(self, columns: int, *schemes: Scheme) -> int:
        """How many channels a rotation mixes, so that it suits all schemes that read them."""
        blocks = [FORMAT_BLOCKS.get(x.weights.format, 0) for x in schemes] if self.block_size is None else []
        block = math.gcd(*blocks) if blocks else self.block_size or 0
        return math.gcd(columns, block) if block else columns
