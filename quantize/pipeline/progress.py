"""Progress tells a person what is being done, how far it is, and how long it will take."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

T = TypeVar("T")
Begin = Callable[[str], None]  # says that a step of some name begins


@contextlib.contextmanager
def named_steps(names: Sequence[str], what: str, console: Console | None) -> Iterator[Begin]:
    """Show steps like the items of `track`; what is yielded is called with the name of each step as it begins."""

    def begin(name: str) -> None:
        assert next(shown) == name

    with contextlib.closing(track(names, what, str, console)) as shown:
        yield begin


def track(items: Sequence[T], what: str, name: Callable[[T], str], console: Console | None) -> Generator[T, None, None]:
    """Yield items under a progress bar on a terminal, as plain lines elsewhere, silently without a console."""
    if console is None:
        yield from items
    elif console.is_terminal:
        yield from bar(items, what, name, console)
    else:
        yield from lines(items, what, name, console)


def bar(items: Sequence[T], what: str, name: Callable[[T], str], console: Console) -> Iterator[T]:
    """Yield items under a bar that shows the current item, the number done, and the time left."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(what, total=len(items))
        for item in items:
            progress.update(task, description=f"{what} {name(item)}")
            yield item
            progress.advance(task)


def lines(items: Sequence[T], what: str, name: Callable[[T], str], console: Console) -> Iterator[T]:
    """Print a line for each item, with the time left at the pace so far, and yield it."""
    start = time.monotonic()
    for done, item in enumerate(items):
        left = (time.monotonic() - start) / done * (len(items) - done) if done else None
        console.print(
            f"{what} {done + 1}/{len(items)} {name(item)}" + (f", {left:.0f} s left" if left is not None else "")
        )
        yield item
