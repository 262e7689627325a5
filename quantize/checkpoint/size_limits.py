"""A config may ask for anything, so what is built from it is bounded by what the files that are to fill it hold.

The bounds hold for every key of every config, since they count what constructors make and not what configs say.
"""

from __future__ import annotations

import contextlib
import ctypes
import resource
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import nn
from torch.nn.modules import module as registration

# Files of packed integers hold two elements a byte, and tied or merged parameters count twice; the rest is a margin.
ELEMENTS_PER_BYTE, PARTS_PER_TENSOR, SLACK = 4, 8, 1 << 20
BUFFER_BYTES = 1 << 27  # of masks and tables of positions, beside as many as the files have
MEMORY = 1 << 30  # bytes that a constructor may take for anything else, beside twice as many as the files have
LARGEST_PARTS, LARGEST_ELEMENTS = 1 << 16, 1 << 43  # of a model that is known by its config alone
SECONDS, SECONDS_PER_TENSOR, AGAIN = 5.0, 0.001, 1.0  # of one core


class TookTooLong(BaseException):
    """Raised in a thread by `limit_time`; no constructor takes it for an error of its own."""


class NoFiles(dict[str, Path]):
    """The files of a model that is known by its config alone."""


@contextlib.contextmanager
def bounded(files: Mapping[str, Path]) -> Iterator[None]:
    """Stop every constructor in the `with` block that makes far more than the files hold, or takes too long.

    Parameters, their elements, modules, bytes of buffers, memory and time are bounded. On the meta device nothing is
    allocated, so build there first.

    Args:
        files: tensor name → file; `NoFiles` has the bounds of the largest models that there are.

    Raises:
        ValueError: it is raised within the constructor, which so cannot go on.
    """
    if isinstance(files, NoFiles):
        held = "the largest models"
        with (
            limit_registrations(LARGEST_PARTS, LARGEST_ELEMENTS, BUFFER_BYTES, held),
            limit_memory(MEMORY, held),
            limit_time(SECONDS + SECONDS_PER_TENSOR * LARGEST_PARTS, held),
        ):
            yield
        return
    size = sum(path.stat().st_size for path in set(files.values()))
    held = f"the {len(files)} tensors of {size} bytes in the files"
    parts = PARTS_PER_TENSOR * (len(files) + 8)
    with (
        limit_registrations(parts, ELEMENTS_PER_BYTE * size + SLACK, size + BUFFER_BYTES, held),
        limit_memory(MEMORY + 2 * size, held),
        limit_time(SECONDS + SECONDS_PER_TENSOR * len(files), held),
    ):
        yield


@contextlib.contextmanager
def limit_registrations(parts: int, elements: int, buffer_bytes: int, held: str) -> Iterator[None]:
    """Bound the parameters, their elements, the modules, and the bytes of buffers of new modules.

    Raises:
        ValueError: there are more than `parts` parameters or modules, or more of the others.
    """
    found = {"parameters": 0, "modules": 0, "elements": 0, "bytes of buffers": 0}
    allowed = {"parameters": parts, "modules": parts, "elements": elements, "bytes of buffers": buffer_bytes}

    def add(what: str, number: int) -> None:
        found[what] += number
        if found[what] > allowed[what]:
            raise ValueError(f"it declares a far larger model than {held}: more than {allowed[what]} {what}")

    def parameter(module: nn.Module, name: str, value: Any) -> None:
        del module, name
        add("parameters", 1)
        add("elements", 0 if value is None else value.numel())

    def module(parent: nn.Module, name: str, value: Any) -> None:
        del parent, name, value
        add("modules", 1)

    def buffer(module: nn.Module, name: str, value: Any) -> None:
        del module, name
        add("bytes of buffers", 0 if value is None else value.nbytes)

    with contextlib.ExitStack() as handles:
        handles.callback(registration.register_module_parameter_registration_hook(parameter).remove)
        handles.callback(registration.register_module_module_registration_hook(module).remove)
        handles.callback(registration.register_module_buffer_registration_hook(buffer).remove)
        yield


@contextlib.contextmanager
def limit_memory(extra: int, held: str) -> Iterator[None]:
    """Bound the memory that a constructor may take, as `limit_data` does.

    Raises:
        ValueError: Python found no more memory; torch raises a RuntimeError of its own.
    """
    try:
        with limit_data(extra):
            yield
    except MemoryError:
        raise ValueError(f"it takes more than {extra} bytes beside its weights, far more than {held} need") from None


@contextlib.contextmanager
def limit_data(extra: int) -> Iterator[None]:
    """Bound the memory that this process may have beside what it has now; other systems than Linux know no such bound.

    Raises:
        MemoryError: Python found no more memory; libraries raise errors of their own.
    """
    status = Path("/proc/self/statm")
    if not status.exists():
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limit = int(status.read_text().split()[5]) * resource.getpagesize() + extra
    try:  # before the limit is set, so that no interruption leaves it there
        resource.setrlimit(resource.RLIMIT_DATA, (limit if soft == resource.RLIM_INFINITY else min(limit, soft), hard))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


@contextlib.contextmanager
def limit_time(seconds: float, held: str) -> Iterator[None]:
    """Bound the seconds of a core that this thread may take.

    It stands within other limits, so that what it raises never stops them from being taken back.

    Raises:
        ValueError: it took more.
    """
    thread, running, sending = threading.get_ident(), threading.Lock(), threading.Lock()
    clock = time.pthread_getcpuclockid(thread)
    end = time.clock_gettime(clock) + seconds

    def watch() -> None:
        due = end
        while not running.acquire(timeout=0.05):
            if time.clock_gettime(clock) > due and sending.acquire(blocking=False):
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(TookTooLong))
                sending.release()
                due += max(seconds, AGAIN)  # what swallows it is told again, and what unwinds is left in peace

    def stop() -> None:  # may be interrupted anywhere, and called again; one that is on its way arrives here
        sending.acquire(timeout=0.1)
        if running.locked():
            running.release()

    watcher = threading.Thread(target=watch, daemon=True)
    running.acquire()
    try:
        try:
            watcher.start()
            yield
        finally:
            stop()
    except TookTooLong:
        stop()
        raise ValueError(f"it takes more than {seconds:.0f} s, far more than {held} need") from None
