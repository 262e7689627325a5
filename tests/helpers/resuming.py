"""Runs that are killed, and resumed: a process that has imported everything and forks one process for each run.

`python resuming.py MODEL DATA DIRECTORY SETTINGS KILLS` prints one JSON object. KILLS is `flushes`, to kill runs when
something has just reached the disk, or a number, to kill so many runs at random moments.
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

from quantize.artifact import writer
from quantize.pipeline.context import RunContext
from quantize.pipeline.distributed import SingleProcess
from quantize.pipeline.prepare import identity_of, prepare
from quantize.pipeline.quantize import run_pipeline
from quantize.pipeline.resume import journal, work_dir
from quantize.recipe.recipe import load_recipe


class Runs:
    def __init__(self, model, data, directory, settings):
        self.directory = Path(directory)
        self.prepared = prepare(model, load_recipe(**json.loads(settings)), Path(data))
        self.reference = self.directory / "undisturbed"
        self.flushes = self.run(self.reference, count=True)

    def start(self, output, resume=False, flush=0, then=None, count=False):
        """Fork a process that quantizes, and does something at the flush of that number."""
        if child := os.fork():
            return child
        done = count_flushes(flush, then)
        with work_dir.ResumableWriter(output, resume) as writer:
            kept = writer.begin(identity_of(self.prepared), SingleProcess())
            context = RunContext(self.prepared.plan.recipe.seed, scratch=writer.directory, journal=kept)
            writer.finished or run_pipeline(self.prepared, writer, context)
        os._exit(len(done) if count else 0)

    def run(self, output, **how):
        """Return the exit code of a run, or minus the signal that ended it."""
        return os.waitstatus_to_exitcode(os.waitpid(self.start(output, **how), 0)[1])

    def killed_after(self, output, flush, seconds):
        """Return whether a run was still alive so long after a flush."""
        reached, tell = os.pipe()
        child = self.start(output, flush=flush, then=lambda: os.write(tell, b"."))
        os.close(tell)
        os.read(reached, 1)
        os.close(reached)
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL

    def resumed(self, output):
        """Return where a killed run was, and whether it is complete and the same after it is resumed."""
        places = sorted(path.name for path in self.directory.glob(f".{output.name}.partial/journal/*"))
        code = self.run(output, resume=True)
        left = sorted(path.name for path in self.directory.glob(f".{output.name}*"))
        return {"places": places, "code": code, "same": tree(output) == tree(self.reference), "left": left}


def count_flushes(number, then):
    """Count each flush from now on, and do something after the one of that number."""
    done, flush = [], writer.flush

    def counted(path):
        flush(path)
        done.append(path)
        if len(done) == number:
            then()

    writer.flush = journal.flush = counted
    return done


def tree(directory):
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def at_flushes(runs):
    """Kill at the first flush, at the last one, and at every third, as borders have no multiple of three of them."""
    for number in sorted({*range(1, runs.flushes + 1, 3), runs.flushes}):
        output = runs.directory / str(number)
        killed = runs.run(output, flush=number, then=lambda: os.kill(os.getpid(), signal.SIGKILL)) == -signal.SIGKILL
        yield {"killed": killed} | runs.resumed(output)


def at_random(runs, count):
    """Yield a moment in each part of a run, after one of its flushes, because other work only makes a run slower."""
    rng, start = random.Random(0), time.monotonic()
    runs.run(runs.directory / "timed")
    seconds = time.monotonic() - start
    for number in range(count):
        output, flush = runs.directory / str(number), (runs.flushes * number + rng.randrange(runs.flushes)) // count + 1
        killed = runs.killed_after(output, flush, rng.random() * seconds / count)
        yield {"killed": killed} | (runs.resumed(output) if killed else {"places": ["all"], "same": True})


def main():
    *arguments, kills = sys.argv[1:]
    torch.set_num_threads(1)
    runs = Runs(*arguments)
    found = at_flushes(runs) if kills == "flushes" else at_random(runs, int(kills))
    print(json.dumps({"flushes": runs.flushes, "kills": list(found)}))


if __name__ == "__main__":
    main()
