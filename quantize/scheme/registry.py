"""The registry turns names in recipes into classes. A class is found because its file lies in the folder."""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

from quantize.errors import UsageError, shown

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
        require_name(self.kind, name, self)
        return self[name](**{key: value for key, value in settings.items() if key != "name"})


def require_name(kind: str, name: str, known: Iterable[str]) -> None:
    """Check that a name is one of those of its kind.

    Raises:
        UsageError: it is not.
    """
    if name not in (names := sorted(known)):
        raise UsageError(f"there is no {kind} {shown(name)}; known are {', '.join(names)}")


def registered(package: str) -> list[str]:
    """Return the names under which the files of a package register classes, without importing them."""
    found = importlib.util.find_spec(package)
    folders = found.submodule_search_locations if found else None
    texts = (path.read_text(encoding="utf-8") for folder in folders or () for path in Path(folder).glob("*.py"))
    return [name for text in texts for name in re.findall(r"^@\w+\.register\(\"(\w+)\"\)", text, re.MULTILINE)]


def import_all(package: str, path: Iterable[str]) -> None:
    """Import every module of a package, so that its classes register."""
    for module in pkgutil.iter_modules(path):
        importlib.import_module(f"{package}.{module.name}")
