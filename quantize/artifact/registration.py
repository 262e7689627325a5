"""Importing this package lets transformers load artifacts, without importing transformers."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

AUTO = "transformers.quantizers.auto"  # the module of transformers that knows the quantizers by name


class RegisterAfterImport(MetaPathFinder):
    """A finder that finds nothing itself: it lets the module `AUTO` register our quantizer once it is imported."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the spec that the other finders find, with a loader that registers afterwards."""
        del path, target
        if fullname != AUTO:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = RegisteringLoader(spec.loader)
        return spec


class RegisteringLoader(Loader):
    """A loader that registers our quantizer after the module has been executed."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """Create the module as the wrapped loader does."""
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Execute the module, then register."""
        self.loader.exec_module(module)
        register()


def register() -> None:
    """Make the quantizer known to transformers; a second time changes nothing."""
    from quantize.artifact import hf_quantizer

    hf_quantizer.register()


def register_when_imported() -> None:
    """Register now if transformers is imported, otherwise as soon as it is."""
    if AUTO in sys.modules:
        register()
    elif not any(isinstance(finder, RegisterAfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, RegisterAfterImport())
