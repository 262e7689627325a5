"""Tables of calibration data that somebody made to break things: one sentence each, in bounded memory and time."""

from __future__ import annotations

import json
import time
import zipfile
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch
from transformers import AutoTokenizer

from quantize.calibration import table_files
from quantize.calibration.data import first_ids
from quantize.calibration.sources import read_source
from quantize.checkpoint import tokenizer as tokenizers
from quantize.checkpoint.tokenizer import Tokenize, load_tokenize, tokenize_with
from quantize.errors import QuantizeError, UsageError
from quantize.eval.similarity import read_pairs
from quantize.graph.inputs import Input
from quantize.pipeline.estimate.peak_memory import peak_memory

pytestmark = pytest.mark.fresh
IDS = {"input_ids": Input(torch.zeros(2, 8, dtype=torch.long), (0, 1))}
MEMORY, TOO_MUCH = 1 << 28, "takes more than 268,435,456 bytes"


@pytest.fixture(scope="module")
def tokenize(stories):
    return load_tokenize(stories)


def read(path, tokenize):
    return read_source(path, IDS, 16, 4, tokenize, 512)


def rows(*records):
    return lambda path: path.write_text(json.dumps(records))


def saved(found):
    return lambda path: torch.save(found, path)


def sparse(size, begins=b""):
    """Return a function that writes a file of zeros that takes no room."""

    def write(path):
        with path.open("wb") as file:
            file.write(begins)
            file.truncate(size)

    return write


def offsets_beyond_the_file(path):
    batch = pyarrow.record_batch({"text": ["abc def ghi " * 20] * 20})
    with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_file(file, batch.schema) as writer:
        writer.write(batch)
    number = (240).to_bytes(4, "little")
    path.write_bytes(path.read_bytes().replace(number, (2**31 - 5).to_bytes(4, "little")))


def bomb(path):
    """A tensor of 2 GB in a file of 2 MB."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        torch.save(torch.zeros(8, dtype=torch.uint8), path.with_name("small.pt"))
        with zipfile.ZipFile(path.with_name("small.pt")) as small:
            for name in small.namelist():
                content = small.read(name)
                archive.writestr(name, bytes(1 << 31) if name.endswith("data/0") else content)


BROKEN = {
    "offsets.arrow": (offsets_beyond_the_file, "Offset invariant failure"),
    "mask.json": (rows({"input_ids": [1, 2], "attention_mask": "xy"}), "cannot be read"),
    "id.json": (rows({"input_ids": [1, 10**30]}), "cannot be read"),
    "deep.json": (lambda path: path.write_text("[" * 10**5), "nested too deeply"),
    "names.json": (rows({"k" * 10**6: 1, "b": 2}), r"has rows of k{120}…; call one of them text"),
    "floats.json": (lambda path: path.write_text("[" + "1.5," * (1 << 23) + "1]"), TOO_MUCH),
    "line.csv": (sparse(1 << 32, b"text\n"), TOO_MUCH),
    "line.jsonl": (sparse(1 << 32, b'{"messages": 1}'), TOO_MUCH),
    "sparse.pt": (saved(torch.eye(3).to_sparse()), "cannot be read"),
    "meta.pt": (saved(torch.ones(4, 9, dtype=torch.long, device="meta")), "cannot be read"),
    "expanded.pt": (saved(torch.ones(1, dtype=torch.long).expand(4, 10**10)), TOO_MUCH),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_broken_tables_end_in_a_sentence(name, tokenize, tmp_path, monkeypatch):
    write, words = BROKEN[name]
    monkeypatch.setattr(table_files, "MEMORY", MEMORY)
    write(tmp_path / name)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before, started = peak_memory(), time.process_time()
    with pytest.raises(QuantizeError, match=words) as raised:
        read(tmp_path / name, tokenize)
    assert peak_memory() - before < 2 * MEMORY
    assert time.process_time() - started < 20
    assert len(str(raised.value)) < 1000


@pytest.mark.slow
def test_a_small_archive_that_becomes_large(tokenize, tmp_path):
    bomb(tmp_path / "x.pt")
    assert (tmp_path / "x.pt").stat().st_size < 3e6
    with pytest.raises(QuantizeError, match=r"x.pt cannot be read|takes more than 1,073,741,824 bytes"):
        read(tmp_path / "x.pt", tokenize)


def test_of_a_long_text_the_beginning_is_tokenized(tokenize, tmp_path):
    """A text of 24 MB without spaces took 5 GB; what a row takes of it is what it would be as a short text."""
    seen = []
    counted = Tokenize(lambda text: seen.append(len(text)) or tokenize(text), tokenize.leading, tokenize.trailing)
    table = pyarrow.table({"text": ["ab" * 12_000_000, "cd " * 8_000_000]})
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet", compression="zstd")
    found = read(tmp_path / "x.parquet", counted).rows
    short = read_source(["ab" * 5000, "cd " * 5000], IDS, 16, 4, tokenize, 512).rows
    assert all(torch.equal(row["input_ids"], other["input_ids"]) for row, other in zip(found, short, strict=True))
    assert sum(seen) < 100_000


def test_a_text_longer_than_a_piece_gives_as_many_ids_as_are_asked_for(tokenize):
    text = "Once upon a time there was a cat. " * 4000
    assert first_ids(tokenize, text, 10**6) == tokenize(text)
    assert first_ids(tokenize, text, 100)[:100] == tokenize(text)[:100]


def test_half_a_character_is_no_reason_to_stop(tokenize):
    assert tokenize("a \ud800 cat") == tokenize("a ? cat")


def test_a_chat_template_that_loops_is_ended(stories, monkeypatch):
    tokenizer = AutoTokenizer.from_pretrained(stories)
    loop = "{% for i in range(99999) %}"
    tokenizer.chat_template = 5 * loop + "x" + 5 * "{% endfor %}"
    monkeypatch.setattr(tokenizers, "TEMPLATE_SECONDS", 0.2)
    with pytest.raises(UsageError, match=r"the chat template refuses .*: it takes more than 0 s"):
        tokenize_with(tokenizer).conversation([{"role": "user", "content": "x"}])


def test_scored_pairs_with_a_sentence_without_end(tmp_path):
    (tmp_path / "x.tsv").write_text("1\ta\tb\n2\ta\t" + "c" * 20_000)
    with pytest.raises(UsageError, match="holds a sentence of more than 16384 characters; give shorter ones"):
        read_pairs(tmp_path / "x.tsv")
