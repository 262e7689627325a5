"""A copy of the test process runs what may leave a process in any state, such as an interruption at any moment."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import time
import traceback
import warnings
from types import SimpleNamespace

LEAVE = os._exit  # tests replace it
SECONDS = 180


def run_apart(command):
    """Call `command` in a child process, with all that is imported and patched here; return code, out and err."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of other threads, which only wait
            child = os.fork()
        if not child:
            LEAVE(code_of(command, out, err))
        end = time.monotonic() + SECONDS
        while not (ended := os.waitpid(child, os.WNOHANG))[0]:
            if time.monotonic() > end:
                os.kill(child, signal.SIGKILL)
            time.sleep(0.01)
        texts = [file.seek(0) or file.read() for file in (out, err)]
    return SimpleNamespace(code=os.waitstatus_to_exitcode(ended[1]), out=texts[0], err=texts[1])


def code_of(command, out, err):
    """Return the exit code of a command whose output goes into files."""
    os.dup2(out.fileno(), 1)
    os.dup2(err.fileno(), 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    try:
        command()
        return 0
    except SystemExit as left:
        return left.code
    except BaseException:  # is what the test is to see
        traceback.print_exc()
        return 99
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
