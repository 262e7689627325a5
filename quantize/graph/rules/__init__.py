"""What each operator does to the channels of its inputs. An operator without a rule pins them; it is never guessed.

Three kinds of statement: channels stay the same, channels meet (are added, or scale one another), a parameter writes or
reads them. Everything is about example-sized label tensors (`labels.py`); no rule knows a module or a model.
"""

from quantize.graph.rules.table import visit
from quantize.recipe.registry import import_all

import_all(__name__, __path__)
__all__ = ["visit"]
