"""Work whose result may be there already, from the run that is continued."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

T = TypeVar("T")


class Once(Protocol):
    """Gives what `make` gives; under a name it has been given before, perhaps without calling it."""

    def __call__(self, name: str, make: Callable[[], T], /) -> T:
        """The result, plain data and tensors (`stored`)."""


def always(name: str, make: Callable[[], T], /) -> T:
    """Nothing is there already."""
    del name
    return make()
