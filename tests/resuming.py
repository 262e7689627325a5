"""Runs that are killed, and resumed: a process that has imported everything and forks one process for each run.

`python resuming.py MODEL DATA DIRECTORY SETTINGS KILLS` prints one JSON object. KILLS is `flushes`, to kill a run
whenever something has just reached the disk, or a number, to kill so many runs at random moments.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from quantize import journal, partial, writer
from quantize.pipeline import run
from quantize.prepare import identity_of, prepare
from quantize.recipe import load_recipe


class Runs:
    def __init__(self, model, data, directory, settings):
        self.directory = Path(directory)
        self.prepared = prepare(model, load_recipe(**json.loads(settings)), Path(data))
        self.reference = self.directory / "undisturbed"
        self.flushes = self.run(self.reference, count=True)

    def start(self, output, resume=False, kill_at=0, count=False):
        """A process that quantizes, and kills itself at the flush of that number."""
        if child := os.fork():
            return child
        done = count_flushes(kill_at)
        with partial.ResumableWriter(output, resume) as writer:
            kept = writer.begin(identity_of(self.prepared))
            writer.finished or run(self.prepared, writer, None, kept)
        os._exit(len(done) if count else 0)

    def run(self, output, **how):
        """The exit code of a run, or minus the signal that ended it."""
        return os.waitstatus_to_exitcode(os.waitpid(self.start(output, **how), 0)[1])

    def killed_after(self, output, seconds):
        """Whether a run was still alive after so long."""
        child = self.start(output)
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL

    def resumed(self, output):
        """Where a killed run was, and whether it is whole and the same once it is resumed."""
        places = sorted(path.name for path in self.directory.glob(f".{output.name}.partial/journal/*"))
        code = self.run(output, resume=True)
        left = sorted(path.name for path in self.directory.glob(f".{output.name}*"))
        return {"places": places, "code": code, "same": tree(output) == tree(self.reference), "left": left}


def count_flushes(kill_at):
    """From here on each flush is noted, and the one of that number is the last thing this process does."""
    done, flush = [], writer.flush

    def counted(path):
        flush(path)
        done.append(path)
        if len(done) == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    writer.flush = journal.flush = counted
    return done


def tree(directory):
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def at_flushes(runs):
    for number in range(1, runs.flushes + 1):
        output = runs.directory / str(number)
        killed = runs.run(output, kill_at=number) == -signal.SIGKILL
        yield {"killed": killed} | runs.resumed(output)


def took(runs, name):
    """Seconds of an undisturbed run."""
    start = time.monotonic()
    runs.run(runs.directory / name)
    return time.monotonic() - start


def at_random(runs, count):
    """A moment in each part of a run, so that no chance leaves out its beginning or its end."""
    rng, seconds = random.Random(0), min(took(runs, name) for name in ("first", "second"))
    for number in range(count):
        output = runs.directory / str(number)
        killed = runs.killed_after(output, seconds * (number + rng.random()) / count)
        yield {"killed": killed} | (runs.resumed(output) if killed else {"places": ["all"], "same": True})


def main():
    *arguments, kills = sys.argv[1:]
    torch.set_num_threads(1)
    runs = Runs(*arguments)
    found = at_flushes(runs) if kills == "flushes" else at_random(runs, int(kills))
    print(json.dumps({"flushes": runs.flushes, "kills": list(found)}))


if __name__ == "__main__":
    main()
