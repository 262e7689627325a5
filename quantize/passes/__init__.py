"""Outlier handlers, one file each: *what* a transform is. *Where* it is legal and *how* it is folded others know."""

from quantize.passes.base import PASSES
from quantize.passes.base import Pass as Pass
from quantize.recipe.registry import import_all

import_all(__name__, __path__)
__all__ = ["PASSES", "Pass"]
