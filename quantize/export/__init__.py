"""What an artifact can be turned into for other runtimes: one folder a target. Here is what all of them share."""

import importlib
import pkgutil

from quantize.export.base import EXPORTERS as EXPORTERS
from quantize.export.base import Exporter as Exporter
from quantize.export.base import Obstacle as Obstacle

for module in pkgutil.iter_modules(__path__):
    if module.ispkg:  # a target; the others are imported by those that need them
        importlib.import_module(f"{__name__}.{module.name}")
