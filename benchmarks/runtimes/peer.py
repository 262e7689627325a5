"""A runtime that lives in an environment of its own is called in a process, with files for what goes in and out."""

from __future__ import annotations

import json
import tempfile
from typing import Any

from benchmarks.cpu.engines import run_command


def call(python: str, peer: str, name: str, **arguments: Any) -> Any:
    """Call a function of a module of this folder in another Python, and return what it returns.

    Raises:
        RuntimeError: it failed; the message has the last line of its errors.
    """
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump({"call": name, "arguments": arguments}, file)
        file.flush()
        return json.loads(run_command([python, "-m", f"benchmarks.runtimes.{peer}", file.name]))
