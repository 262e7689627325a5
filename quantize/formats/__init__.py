"""Number formats, one in a file, and the packed tensors that hold their values."""

from quantize.formats.base import FORMATS, NumberFormat, get_format
from quantize.formats.check import check_args, check_scheme
from quantize.scheme.registry import import_all

import_all(__name__, __path__)
__all__ = ["FORMATS", "NumberFormat", "check_args", "check_scheme", "get_format"]
