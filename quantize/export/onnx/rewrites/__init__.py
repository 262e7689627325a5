"""Passes of onnx-ir, one in a file, rewrite an exported graph so that ONNX Runtime is fast on it."""

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

# The first pass lets linears with the same input share the nodes that quantize it, so that they can be merged.
PASSES = (CommonSubexpressionEliminationPass, CacheInAttention, HeadsInPlace, MergeLinears, AddInNorm, StoreTiedOnce)


STANDARD = (CommonSubexpressionEliminationPass, CacheInAttention, HeadsInPlace, StandardLinears, TurnTied)


def rewrite(model: onnx_ir.Model, portable: bool = False) -> None:
    """Apply all passes to a model, in place; it computes the same up to the order of sums.

    Args:
        model: a traced model.
        portable: whether only standard operators may be left.
    """
    model.opset_imports.setdefault("com.microsoft", 1)
    # The exporter notes the lines of source files, with the paths of this machine, in each node.
    tidy = (RemoveUnusedNodesPass, RemoveUnusedOpsetsPass, TopologicalSortPass, ClearMetadataAndDocStringPass)
    Sequential(*(kind() for kind in (*(STANDARD if portable else PASSES), *tidy)))(model)
