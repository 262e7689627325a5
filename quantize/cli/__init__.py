"""The command `quantize-model`."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from types import FrameType
from typing import NoReturn

import click
from click_default_group import DefaultGroup

from quantize.cli.artifacts import merge_stats, report, run, verify
from quantize.cli.listings import completion, recipes, schemes
from quantize.cli.measure import evaluate, inspect
from quantize.cli.prune import prune
from quantize.cli.quantize import quantize
from quantize.errors import QuantizeError, UsageError, reason
from quantize.export.command import export

HELP = """Quantize transformers to 4-bit weights and activations with little loss, and check every step.

`quantize-model MODEL --scheme W4A4 --output-dir OUT` quantizes a model; `quantize-model quantize --help` lists its
options.
"""
LONGEST_MESSAGE = 4000  # characters; names of tensors, which it may hold, have no bound
commands: click.Group = DefaultGroup(
    default="quantize",
    help=HELP,
    commands=[
        quantize,
        prune,
        merge_stats,
        inspect,
        evaluate,
        export,
        run,
        verify,
        report,
        recipes,
        schemes,
        completion,
    ],
    context_settings={"help_option_names": ["-h", "--help"]},
)
click.version_option(package_name="quantize-model")(commands)

PATIENCE = 2  # the Ctrl-C that no longer waits for code that must end
WRITERS = ("ArtifactWriter", "ResumableWriter")
ON_DISK = {f"{writer}.__{way}__" for writer in WRITERS for way in ("enter", "exit")} | {"remove"}


def system_error(error: OSError | MemoryError) -> str:
    """Say what the system refused, such as a file in a place that cannot be written."""
    if isinstance(error, MemoryError):
        return "there is not enough memory; --dry-run says how much a run takes"
    where = f"{error.filename}: " if error.filename else ""
    return f"{where}{error.strerror or reason(error)}; give a place that can be read and written and has room"


def must_end(frame: FrameType | None) -> bool:
    """Return whether this code must not be left by an exception.

    Either C++ of torch has called it, as it does while it exports, and may abort; or it makes or removes what a run
    leaves on the disk, which is done in no time, and what is half done would stay.
    """
    while frame is not None:
        if frame.f_code.co_name == "__torch_dispatch__" or frame.f_code.co_qualname in ON_DISK:
            return True
        frame = frame.f_back
    return False


def main() -> NoReturn:
    """Run the command. The exit code is 0 when it is done, 1 when it failed, and 2 for wrong use."""
    signals: list[int] = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        signals.append(number)
        asked = sum(each != signal.SIGALRM for each in signals)
        waits = asked < PATIENCE and must_end(frame)
        signal.setitimer(signal.ITIMER_REAL, 0.05 if waits else 0.5)  # again until the run has ended, as a library may
        if not waits:  # swallow the exception
            raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM):
        signal.signal(number, interrupt)
    try:
        commands.main(prog_name="quantize-model", standalone_mode=False)
        sys.exit(0)
    except click.UsageError as error:
        error.show()
        sys.exit(2)
    except (KeyboardInterrupt, Exception) as error:
        kept = getattr(error.__cause__ if isinstance(error, click.Abort) else error, "__notes__", [])
        # a library may have made another error of the interruption
        if not signals and not isinstance(error, KeyboardInterrupt | click.Abort):
            if not isinstance(error, QuantizeError | OSError | MemoryError):
                raise
            told = str(error) if isinstance(error, QuantizeError) else system_error(error)
            told = told if len(told) <= LONGEST_MESSAGE else f"{told[:LONGEST_MESSAGE]}…"
            click.echo("; ".join([f"error: {told}", *kept]), err=True)
            sys.exit(2 if isinstance(error, UsageError) else 1)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    with contextlib.suppress(OSError):  # whoever read the output may be gone
        click.echo("; ".join(["interrupted", *(kept or ["nothing was kept"])]), err=True)
        sys.stdout.flush()
    os._exit(1)  # all is cleaned up, and Python would take seconds to take torch and a model apart
