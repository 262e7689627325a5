"""Rules say what each operator does to the channels of its inputs. An operator without a rule pins them.

A rule says one of three things: channels stay the same, channels meet (they are added, or scale one another), or a
parameter writes or reads them. Rules work on label tensors of the example sizes (`labels.py`), and no rule knows a
module or a model.
"""

from quantize.graph.rules.table import visit
from quantize.scheme.registry import import_all

import_all(__name__, __path__)
__all__ = ["visit"]
