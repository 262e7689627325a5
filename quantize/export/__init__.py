"""An artifact is exported for other runtimes by one folder for each target; the files here are shared by all."""

import importlib
import pkgutil

from quantize.export.base import EXPORTERS as EXPORTERS
from quantize.export.base import Exporter as Exporter
from quantize.export.base import Obstacle as Obstacle

for module in pkgutil.iter_modules(__path__):
    if module.ispkg:  # a target; the modules are imported by the targets that need them
        importlib.import_module(f"{__name__}.{module.name}")
