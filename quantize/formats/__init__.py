"""Number formats, one file each, and the packed tensors that hold their values."""

from quantize.formats.base import FORMATS, check_args, check_scheme, get_format
from quantize.formats.base import NumberFormat as NumberFormat
from quantize.recipe.registry import import_all

import_all(__name__, __path__)
__all__ = ["FORMATS", "NumberFormat", "check_args", "check_scheme", "get_format"]
