"""Blocks are read ahead and written behind, each by one thread, while the block between them is at work.

So at most three blocks are held: one that arrives, one at work, and one that leaves.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self, TypeVar

T = TypeVar("T")
U = TypeVar("U")


def read_ahead(items: Iterable[T], read: Callable[[T], U]) -> Iterator[U]:
    """Yield `read(item)` for each item; a thread reads the next one while the one before it is in use."""
    coming = deque[Future[U]]()
    with ThreadPoolExecutor(1, "reader") as reader:
        for item in items:
            coming.append(reader.submit(read, item))
            if len(coming) > 1:
                yield coming.popleft().result()
        while coming:
            yield coming.popleft().result()


class WriteBehind:
    """A thread that does one thing at a time, in order; what fails there is raised where the next thing is asked for.

    Leaving the `with` block waits for what was asked for, also after an error, which then stands for all others.
    """

    def __init__(self) -> None:
        self.writer = ThreadPoolExecutor(1, "writer")
        self.last: Future[None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.writer.shutdown(wait=True)
        if error is None:
            self.wait()

    def do(self, job: Callable[[], None]) -> None:
        """Do something behind the caller's back, once what was asked for before is done."""
        self.wait()
        self.last = self.writer.submit(job)

    def wait(self) -> None:
        """Wait until what was asked for is done."""
        last, self.last = self.last, None
        if last is not None:
            last.result()
