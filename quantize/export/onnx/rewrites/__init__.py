"""What an exported graph becomes so that ONNX Runtime is fast on it: one pass of onnx-ir a file."""

from __future__ import annotations

import onnx_ir
from onnx_ir.passes import Sequential
from onnx_ir.passes.common import (
    ClearMetadataAndDocStringPass,
    CommonSubexpressionEliminationPass,
    RemoveUnusedNodesPass,
    RemoveUnusedOpsetsPass,
    TopologicalSortPass,
)

from quantize.export.onnx.rewrites.attention import CacheInAttention
from quantize.export.onnx.rewrites.heads import HeadsInPlace
from quantize.export.onnx.rewrites.merge import MergeLinears
from quantize.export.onnx.rewrites.norm import AddInNorm
from quantize.export.onnx.rewrites.portable import StandardLinears
from quantize.export.onnx.rewrites.tied import StoreTiedOnce, TurnTied

# The first lets linears with the same input share what quantizes it, so that they can be merged.
PASSES = (CommonSubexpressionEliminationPass, CacheInAttention, HeadsInPlace, MergeLinears, AddInNorm, StoreTiedOnce)


STANDARD = (CommonSubexpressionEliminationPass, CacheInAttention, HeadsInPlace, StandardLinears, TurnTied)


def rewrite(model: onnx_ir.Model, portable: bool = False) -> None:
    """Apply all passes to a model, in place; the function stays but for the order of sums.

    Args:
        model: as it is traced.
        portable: only standard operators are left.
    """
    model.opset_imports.setdefault("com.microsoft", 1)
    # The exporter notes in each node which lines of which files it came from, with the paths of this machine.
    tidy = (RemoveUnusedNodesPass, RemoveUnusedOpsetsPass, TopologicalSortPass, ClearMetadataAndDocStringPass)
    Sequential(*(kind() for kind in (*(STANDARD if portable else PASSES), *tidy)))(model)
