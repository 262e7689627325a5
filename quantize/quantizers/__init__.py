"""Quantizers, one in a file, round weights to a number format."""

from quantize.quantizers.base import QUANTIZERS
from quantize.quantizers.base import Quantizer as Quantizer
from quantize.scheme.registry import import_all

import_all(__name__, __path__)
__all__ = ["QUANTIZERS", "Quantizer"]
