"""quantize-model: makes transformers 4-bit with the least loss, and proves each step."""

from quantize.artifact import load as load
from quantize.pipeline import quantize_model as quantize_model

__all__ = ["load", "quantize_model"]
