"""The registry turns names in recipes into classes. A class is found because its file lies in the folder."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterable
from typing import Any, TypeVar

from quantize.errors import UsageError

T = TypeVar("T", bound=type)


class Registry(dict[str, type[Any]]):
    """The classes of one kind (`pass`, `quantizer`, `number format`) by name."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def register(self, name: str) -> Any:
        """Class decorator: enter a class under the name that recipes use."""

        def enter(cls: T) -> T:
            self[name] = cls
            cls.name = name  # type: ignore[attr-defined]
            return cls

        return enter

    def make(self, settings: Any) -> Any:
        """Make an instance from `{"name": …, parameters…}`; an instance is returned as it is.

        Raises:
            UsageError: no class has that name.
        """
        if not isinstance(settings, dict):
            return settings
        name = str(settings.get("name"))
        if name not in self:
            raise UsageError(f"there is no {self.kind} {name!r}; known are {', '.join(sorted(self))}")
        return self[name](**{key: value for key, value in settings.items() if key != "name"})


def import_all(package: str, path: Iterable[str]) -> None:
    """Import every module of a package, so that its classes register."""
    for module in pkgutil.iter_modules(path):
        importlib.import_module(f"{package}.{module.name}")
