"""Where a run may write is checked before anything slow is imported."""

from __future__ import annotations

from pathlib import Path

from quantize.errors import UsageError


def require_new(output: Path) -> None:
    """Check that an output does not exist.

    Raises:
        UsageError: it does; nothing is ever overwritten.
    """
    if output.exists() or output.is_symlink():
        raise UsageError(f"{output} exists already; give a new --output-dir")


def require_resumable(output: Path) -> None:
    """Check that a run which is to go on has not ended; there may be none yet.

    Raises:
        UsageError: the run is finished, or the output is something else.
    """
    if partial_directory(output).exists():
        return
    if (output / "manifest.json").is_file():
        raise UsageError(f"{output} is finished, so there is nothing to go on with; leave --resume out")
    require_new(output)


def partial_directory(output: Path) -> Path:
    """Return the directory in which a run works, beside the output or its first parent that does not exist yet."""
    path, beside = output.absolute(), first_existing_parent(output)
    return beside / f".{'-'.join(path.relative_to(beside).parts)}.partial"


def first_existing_parent(path: Path) -> Path:
    """Return the nearest folder above a path that exists; a root lies in itself."""
    return next((parent for parent in path.absolute().parents if parent.exists()), path.absolute())
