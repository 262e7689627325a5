"""Thousands of broken files of every kind, each read by a command: `python -m benchmarks.fuzz [N [SEED]] [--record]`.

A command ends cleanly if its exit code is 0, 1 or 2 within `SECONDS` and `MEMORY`, without another exception, and if
nothing half-written is left. The exit code is 1 if one did not. `--record` adds the table to those of other seeds in
`benchmarks/results/fuzz.json` and `.md`, so that many files may be broken in parts.
"""

from __future__ import annotations

import contextlib
import io
import json
import random
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import torch
from rich.console import Console
from rich.table import Column, Table

from benchmarks.alarm import raising_after
from benchmarks.fuzz.mutations import KINDS, Sound, broken
from quantize import cli
from quantize.export.directory import export_artifact
from quantize.pipeline.quantize import collect_stats, quantize_model
from quantize.recipe.recipe import load_recipe

MODEL = Path(__file__).resolve().parents[2] / "tests" / "models" / "stories260K"
SECONDS, MEMORY = 20, 3 << 29  # of a core, and bytes beside what the process had before
NUMBERS = ("files", "exit 0", "exit 1", "exit 2", "unclean", "longest, s", "peak, MB")
RESULTS = Path(__file__).resolve().parents[1] / "results"
ROWS = '{{"input_ids": [{}]}}\n'


class TookTooLongError(BaseException):
    """Raised in a command that does not end; no library takes it for an error of its own."""


@dataclass
class Tally:
    """What came of the broken files of one kind; seconds of a core, and bytes beside those before the command."""

    codes: Counter[int] = field(default_factory=Counter)
    unclean: list[str] = field(default_factory=list)
    seconds: float = 0.0
    memory: int = 0

    def __add__(self, other: Tally) -> Tally:
        longest, most = max(self.seconds, other.seconds), max(self.memory, other.memory)
        return Tally(self.codes + other.codes, self.unclean + other.unclean, longest, most)

    def row(self) -> list[str]:
        """Return the cells of a table: files, exit codes 0, 1 and 2, unclean, the longest time, the peak of memory."""
        counts = (self.codes.total(), self.codes[0], self.codes[1], self.codes[2], len(self.unclean))
        return [*map(str, counts), f"{self.seconds:.1f}", f"{self.memory / 1e6:.0f}"]


def sound_files(folder: Path) -> Sound:
    """Make one sound file or directory of each kind, of one layer of a small model."""
    model = Path(shutil.copytree(MODEL, folder / "model"))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    text = folder / "rows.jsonl"
    text.write_text("".join(ROWS.format(", ".join(str(1 + (i * j) % 97) for j in range(16))) for i in range(4)))
    write_tables(folder / "tables")
    rtn = {"quantizer": {"name": "rtn"}, "passes": [{"name": "smoothquant"}]}
    small: dict[str, Any] = {"group_size": 0, "nsamples": 2, "seqlen": 16}
    for name in ("a", "b"):
        part = folder / f"{name}.jsonl"
        part.write_text(ROWS.format(", ".join(str(ord(name) + j) for j in range(16))) * 2)
        collect_stats(model, output=folder / name, recipe=load_recipe("W8A8", rtn, **small), calibration=part)
    artifact = folder / "artifact"
    quantize_model(model, output_dir=artifact, scheme="W8A8", recipe=rtn, calibration=text, **small)
    export_artifact(artifact, "onnx", folder / "onnx")
    found = {"statistics": folder / "a", "other statistics": folder / "b", "onnx": folder / "onnx"}
    return found | {"model": model, "text": text, "artifact": artifact, "tables": folder / "tables"}


def write_tables(folder: Path) -> None:
    """Write a sound file of calibration data of each kind that is read record by record."""
    texts = [{"text": f"Once upon a time there were {i} cats who lived in a house by the sea."} for i in range(4)]
    folder.mkdir()
    table = pyarrow.Table.from_pylist(texts)
    pyarrow.parquet.write_table(table, folder / "a.parquet")
    with pyarrow.OSFile(str(folder / "a.arrow"), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    ids = [[1 + (i * j) % 97 for j in range(16)] for i in range(4)]
    padded = [{"input_ids": row, "attention_mask": [0] + [1] * 15} for row in ids]
    (folder / "a.json").write_text(json.dumps(padded))
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in padded))
    (folder / "a.csv").write_text("text\n" + "".join(f"{row['text']}\n" for row in texts))
    torch.save({name: torch.tensor([row[name] for row in padded]) for name in padded[0]}, folder / "a.pt")


def fuzz(sound: Sound, kinds: Sequence[str], count: int, seed: int, folder: Path) -> dict[str, Tally]:
    """Break `count` files of each kind and read each."""
    found = {kind: Tally() for kind in kinds}
    for kind in kinds:
        for number in range(count):
            place = folder / f"{kind}-{number}"
            place.mkdir()
            try:
                arguments = broken(kind, sound, place, random.Random(f"{seed} {kind} {number}"))
            except (UnicodeEncodeError, RuntimeError):  # what could not be written
                continue
            read(arguments, place, found[kind], f"{kind} {number}")
            shutil.rmtree(place)
    return found


def read(arguments: list[str], place: Path, tally: Tally, name: str) -> None:
    """Run one command in this process, and note what came."""
    why, output, before, started = "", io.StringIO(), reset_peak(), time.process_time()
    try:
        with (
            raising_after(SECONDS, TookTooLongError, of_a_core=True),
            contextlib.redirect_stdout(output),
            contextlib.redirect_stderr(output),
        ):
            sys.argv = ["quantize-model", *arguments]
            cli.main()
    except SystemExit as ended:
        code = int(ended.code or 0)
        tally.codes[code] += 1
        why = "" if code in (0, 1, 2) else f"exit code {code}"
    except TookTooLongError:
        why = f"no end in {SECONDS} s of a core"
    except BaseException as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        why = f"{type(error).__name__} at {Path(frame.filename).name}:{frame.lineno}: {str(error)[:90]}"
    seconds, memory = time.process_time() - started, peak() - before
    tally.seconds, tally.memory = max(tally.seconds, seconds), max(tally.memory, memory)
    left = [path.name for path in place.iterdir() if path.name.startswith(".")]
    why = why or (f"left {left[0]}" if left else "") or (f"took {memory:,} bytes" if memory > MEMORY else "")
    if why:
        tally.unclean.append(f"{name}: {why}")
        print(tally.unclean[-1], file=sys.stderr, flush=True)


def reset_peak() -> int:
    """Let the peak of this process's memory begin anew, and return what it has now, in bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak()


def peak() -> int:
    """Return the peak of this process's memory, in bytes."""
    return 1024 * int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])


def table(found: dict[str, Tally]) -> Table:
    """Return the counts, the peak memory and the longest time of each kind."""
    made = Table(Column("kind", no_wrap=True), *NUMBERS)
    for kind, tally in found.items():
        made.add_row(kind, *tally.row())
    return made


def record(seed: int, found: dict[str, Tally]) -> None:
    """Add a table to those of other seeds, and write the sum of all."""
    path = RESULTS / "fuzz.json"
    all_seeds = json.loads(path.read_text()) if path.exists() else {}
    all_seeds[str(seed)] = {kind: {**vars(tally), "codes": dict(tally.codes)} for kind, tally in found.items()}
    path.write_text(json.dumps(all_seeds, indent=1, sort_keys=True) + "\n")
    total = dict.fromkeys(KINDS, Tally())
    for tallies in all_seeds.values():
        for kind, tally in tallies.items():
            codes = Counter({int(code): count for code, count in tally.pop("codes").items()})
            total[kind] += Tally(codes, **tally)
    lines = [f"| {' | '.join(cells)} |" for cells in (["kind", *NUMBERS], ["---"] * (1 + len(NUMBERS)))]
    lines += [f"| {' | '.join([kind, *tally.row()])} |" for kind, tally in total.items()]
    files = sum(tally.codes.total() for tally in total.values())
    unclean = sum(len(tally.unclean) for tally in total.values())
    seeds = ", ".join(sorted(all_seeds, key=int))
    head = f"`make fuzz` broke {files:,} files (seeds {seeds}), of which {unclean} were not answered cleanly:"
    note = "Seconds are those of a core; memory is what the command took beside what the process had before it."
    (RESULTS / "fuzz.md").write_text("\n".join(["# Broken files", "", head, "", *lines, "", note, ""]))


def main() -> None:
    """Fuzz every kind, and print the table."""
    given = [int(x) for x in sys.argv[1:] if x != "--record"]
    records = "--record" in sys.argv
    total, seed = given[0] if given else 10_000, given[1] if len(given) > 1 else 0
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        (place / "broken").mkdir()
        found = fuzz(sound_files(place), KINDS, -(-total // len(KINDS)), seed, place / "broken")
    Console().print(table(found))
    if records:
        record(seed, found)
    sys.exit(any(tally.unclean for tally in found.values()))


if __name__ == "__main__":
    main()
