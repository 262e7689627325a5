"""Several processes quantize one model: the artifact is that of one process, to the last byte."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from quantize.errors import UsageError
from quantize.pipeline.distributed import SingleProcess
from quantize.pipeline.fingerprint import diff_fingerprints
from quantize.pipeline.quantize import check_ranks, quantize_model
from quantize.recipe.recipe import load_recipe

ROWS = {"nsamples": 12, "seqlen": 512}  # three batches of 4 rows


def tree(directory):
    """Every file with its bytes."""
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def command(model, output, scheme):
    rows = [f"--{name}={value}" for name, value in ROWS.items()]
    return ["-m", "quantize", str(model), "--scheme", scheme, "--output-dir", str(output), "--group-size", "0", *rows]


@pytest.mark.slow
@pytest.mark.parametrize(("scheme", "count"), [("W4A16", 4), ("W4A4", 2)])
def test_any_number_of_ranks_makes_the_same_artifact(variant, torchrun, tmp_path, scheme, count):
    """GPTQ on four ranks, of which one has no data; learned rotations, GPTAQ and drift on two."""
    model = variant("two", num_hidden_layers=2)
    quantize_model(model, output_dir=tmp_path / "one", scheme=scheme, group_size=0, **ROWS)
    done = torchrun(*command(model, tmp_path / "many", scheme), count=count)
    assert done.returncode == 0, done.stderr
    assert tree(tmp_path / "many") == tree(tmp_path / "one")
    assert done.stdout.count("of the body's parameters quantized") == 1
    assert {path.name for path in tmp_path.iterdir()} == {"one", "many", "two"}


@pytest.mark.slow
def test_two_killed_ranks_are_resumed_by_one(variant, tmp_path):
    model = variant("two", num_hidden_layers=2)
    quantize_model(model, output_dir=tmp_path / "one", scheme="W4A4", group_size=0, **ROWS)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    run = [*command(model, tmp_path / "many", "W4A4"), "--resume"]
    killed = subprocess.Popen([*launch, *run], stderr=subprocess.DEVNULL)
    journal = tmp_path / ".many.partial" / "journal"
    while killed.poll() is None and not list(journal.glob("border-00002")):
        time.sleep(0.01)
    ranks = Path(f"/proc/{killed.pid}/task/{killed.pid}/children").read_text().split()
    assert len(ranks) == 2
    for process in (killed.pid, *map(int, ranks)):
        os.kill(process, signal.SIGKILL)
    killed.wait()
    lock = os.open(journal.parent, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)  # as soon as the first rank is gone
    os.close(lock)
    border = max(journal.glob("border-*[0-9]"))
    assert len(list(border.glob("calibration-*"))) == 3
    artifact = quantize_model(model, output_dir=tmp_path / "many", scheme="W4A4", group_size=0, **ROWS, resume=True)
    assert tree(artifact.directory) == tree(tmp_path / "one")


class Two(SingleProcess):
    """The first of two ranks, the other of which sees other data."""

    count = 2

    def gather(self, value):
        return [value, value | {"data": {"calibration": "other"}}]


def test_what_ranks_cannot_do_together_is_refused():
    found = {"model": {}, "data": {"calibration": "mine"}}
    with pytest.raises(UsageError, match=r"the data \(calibration\) of rank 1 differs from that of rank 0"):
        check_ranks(load_recipe("W4A16", {}), Two(), found)
    with pytest.raises(UsageError, match="tune runs in one process; start without torchrun"):
        check_ranks(load_recipe("W4A16", {"tune": {"steps": 2}}), Two(), found)
    assert not diff_fingerprints(found, found)
