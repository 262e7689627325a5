"""Progress tells a person, or a program, what is being done, how far it is, and how long it will take."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

T = TypeVar("T")
Begin = Callable[[str], None]  # says that a step of some name begins


class JsonConsole(Console):
    """A console for programs, which writes one JSON object a line to the standard output stream.

    `event` says what it is: `step` (`what` is done with which `name`, the `number` of it and the number `of` all, and
    `seconds_left` or null), `message` (its `text`), or `done` with the result.
    """

    def __init__(self) -> None:
        super().__init__(file=sys.stdout, force_terminal=False)

    def event(self, event: str, **fields: Any) -> None:
        """Write one line."""
        self.file.write(json.dumps({"event": event, **fields}) + "\n")
        self.file.flush()

    def print(self, *objects: Any, **_: Any) -> None:
        """Write a message."""
        self.event("message", text=" ".join(map(str, objects)))


@contextlib.contextmanager
def named_steps(names: Sequence[str], what: str, console: Console | None) -> Iterator[Begin]:
    """Show steps like the items of `track`, without the time left, as one step says nothing about the time of another.

    What is yielded is called with the name of each step as it begins.
    """

    def begin(name: str) -> None:
        assert next(shown) == name

    with contextlib.closing(track(names, what, str, console, forecast=False)) as shown:
        yield begin


def track(
    items: Sequence[T], what: str, name: Callable[[T], str], console: Console | None, forecast: bool = True
) -> Generator[T, None, None]:
    """Yield items under a progress bar on a terminal, as lines elsewhere, silently without a console.

    With `forecast` the time left is told, for items that take about equally long.
    """
    if console is None:
        yield from items
    elif console.is_terminal:
        yield from bar(items, what, name, console, forecast)
    else:
        yield from lines(items, what, name, console, forecast)


def bar(items: Sequence[T], what: str, name: Callable[[T], str], console: Console, forecast: bool) -> Iterator[T]:
    """Yield items under a bar that shows the current item, the number done, and the time left or spent."""
    time_column = TimeRemainingColumn() if forecast else TimeElapsedColumn()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), time_column)
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(what, total=len(items))
        for item in items:
            progress.update(task, description=f"{what} {name(item)}")
            yield item
            progress.advance(task)


def lines(items: Sequence[T], what: str, name: Callable[[T], str], console: Console, forecast: bool) -> Iterator[T]:
    """Print a line for each item, with the time left at the pace so far if it is asked for, and yield it."""
    start = time.monotonic()
    for done, item in enumerate(items):
        left = (time.monotonic() - start) / done * (len(items) - done) if done and forecast else None
        number, of = done + 1, len(items)
        if isinstance(console, JsonConsole):
            seconds = None if left is None else round(left, 1)
            console.event("step", what=what, name=name(item), number=number, of=of, seconds_left=seconds)
        else:
            told = f", {left:.0f} s left" if left is not None else ""
            console.print(f"{what} {number}/{of} {name(item)}{told}")
        yield item
