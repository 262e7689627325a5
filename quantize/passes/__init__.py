"""Outlier handlers, one file each. A pass says what a transform is, not where it is legal or how it is folded."""

from quantize.passes.base import PASSES
from quantize.passes.base import Pass as Pass
from quantize.scheme.registry import import_all

import_all(__name__, __path__)
__all__ = ["PASSES", "Pass"]
