"""Calibration data as people have it: tables, lists, conversations and tensors in files, and anything in memory."""

from __future__ import annotations

import csv
import json
import sys
from types import SimpleNamespace

import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset
from transformers import AutoTokenizer

from quantize.calibration.sources import read_source
from quantize.checkpoint.paths import is_data_set
from quantize.checkpoint.tokenizer import load_tokenize, tokenize_with
from quantize.errors import QuantizeError, UsageError
from quantize.graph.inputs import Input

TEXTS = ["Once upon a time there was a dog.", "The sun was warm.", "Tom and Sue went to the big park to play."]
IDS = [[1, 5, 9, 11], [1, 7, 7, 2, 3], [1, 300, 4]]
INPUTS = {"input_ids": Input(torch.zeros(2, 8, dtype=torch.long, device="meta"), (0, 1))}
IMAGES = {"pixel_values": Input(torch.zeros(2, 3, 4, 4, device="meta"), (0,))}
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"


@pytest.fixture(scope="module")
def tokenize(stories):
    return load_tokenize(stories)


def read(data, tokenize=None, inputs=INPUTS, limit=8, seqlen=16):
    return read_source(data, inputs, seqlen, limit, tokenize, 512)


def ids(samples):
    return [next(iter(row.values())).tolist() for row in samples.rows]


def padded():
    """The rows of IDS in one tensor, the second one padded in front."""
    rows, mask = torch.full((3, 5), 509), torch.zeros(3, 5, dtype=torch.long)
    for n, row in enumerate(IDS):
        where = slice(5 - len(row), 5) if n == 1 else slice(0, len(row))
        rows[n, where], mask[n, where] = torch.tensor(row), 1
    return {"input_ids": rows, "attention_mask": mask}


def test_texts_become_whole_rows(tokenize):
    assert ids(read(TEXTS, tokenize)) == [tokenize.whole(text)[:16] for text in TEXTS]
    assert ids(read([{"text": text, "title": "x"} for text in TEXTS], tokenize)) == ids(read(TEXTS, tokenize))


def batches():
    """Ids in every form in which they are given in memory."""
    rows = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12]])
    yield rows
    yield rows.tolist()
    yield list(rows)
    yield (row for row in rows.split(2))
    yield [{"input_ids": part, "labels": part} for part in rows.split(2)]
    yield DataLoader(TensorDataset(rows, rows), batch_size=2)
    yield {"input_ids": rows}
    yield [{"input_ids": row} for row in rows.tolist()]


@pytest.mark.parametrize("number", range(8))
def test_ids_in_every_form_are_the_same_samples(number):
    found = read(list(batches())[number])
    assert ids(found) == [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12]]
    assert found.sha256 == read(next(batches())).sha256


def test_a_padded_token_is_in_no_sample():
    assert ids(read(padded())) == IDS == ids(read(IDS))
    assert read(padded()).sha256 == read(IDS).sha256
    with pytest.raises(UsageError, match="an attention_mask of 2 for 3 token ids; give as many"):
        read([{"input_ids": [1, 2, 3], "attention_mask": [1, 1]}])


def test_statistics_are_the_same_with_and_without_padding(small_run, one_layer):
    recipe = {"passes": [{"name": "smoothquant"}], "quantizer": {"name": "gptq"}}
    first = small_run(one_layer, "W4A8", calibration=padded(), output="a", recipe=recipe)
    second = small_run(one_layer, "W4A8", calibration=IDS, output="b", recipe=recipe)
    assert first.manifest["files"] == second.manifest["files"]


def test_an_iterable_is_read_as_far_as_it_is_asked_for_and_a_list_is_spread():
    endless = iter(lambda: torch.tensor([[1, 2, 3]]), None)
    assert len(read(endless, limit=3).rows) == 3
    assert ids(read([[1, n] for n in range(8)], limit=2)) == [[1, 0], [1, 4]]


def write(path, rows):
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        path.write_text(json.dumps({"version": 1, "data": rows} if path.stem == "object" else rows))
    return path


@pytest.mark.parametrize("name", ["a.parquet", "a.csv", "a.json", "object.json"])
def test_tables_of_texts(name, tokenize, tmp_path):
    path = write(tmp_path / name, [{"text": text, "source": "x"} for text in TEXTS])
    assert ids(read(path, tokenize)) == ids(read(TEXTS, tokenize))
    only = write(tmp_path / f"only-{name}", [{"story": text} for text in TEXTS])
    assert ids(read(str(only), tokenize, limit=1)) == ids(read(TEXTS, tokenize))[:1]


@pytest.mark.parametrize("name", ["a.parquet", "a.json", "a.jsonl"])
def test_conversations_go_through_the_chat_template(name, stories, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(stories)
    messages = [{"role": "user", "content": "Who is Tom?"}, {"role": "assistant", "content": "A boy."}]
    path = write(tmp_path / name, [{"messages": messages}] * 2)
    with pytest.raises(UsageError, match="has no chat template for rows of messages; give rows of text"):
        read(path, tokenize_with(tokenizer, "here"))
    tokenizer.chat_template = TEMPLATE
    expected = tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
    assert ids(read(path, tokenize_with(tokenizer), seqlen=99)) == [expected] * 2
    with pytest.raises(UsageError, match="the chat template refuses"):
        read([{"messages": [1]}], tokenize_with(SimpleNamespaceTokenizer(tokenizer)))


class SimpleNamespaceTokenizer(SimpleNamespace):
    """A tokenizer whose template fails."""

    chat_template = "x"

    def __init__(self, tokenizer):
        super().__init__(convert_ids_to_tokens=tokenizer.convert_ids_to_tokens, call=tokenizer)

    def __call__(self, *args, **kwargs):
        return self.call(*args, **kwargs)

    def apply_chat_template(self, *_, **__):
        raise TypeError("no role")


def test_tensors_that_torch_saved(tmp_path):
    path = tmp_path / "data.pt"
    for data in (torch.tensor([[1, 2, 3], [4, 5, 6]]), [torch.tensor([1, 2, 3]), torch.tensor([4, 5, 6])]):
        torch.save(data, path)
        assert ids(read(path)) == [[1, 2, 3], [4, 5, 6]]
    torch.save(padded(), path)
    assert ids(read(path)) == IDS
    torch.save({"pixel_values": torch.ones(3, 3, 4, 4)}, path)
    assert len(read(path, inputs=IMAGES).rows) == 3


class Harmful:
    def __reduce__(self):
        return print, ("code was run",)


def test_a_file_of_tensors_runs_no_code(tmp_path, capsys):
    torch.save([Harmful()], tmp_path / "data.pt")
    with pytest.raises(QuantizeError, match=r"data\.pt cannot be read"):
        read(tmp_path / "data.pt")
    assert not capsys.readouterr().out


@pytest.mark.parametrize(
    ("data", "error", "words"),
    [
        (7, UsageError, "the calibration data is a int; give texts, ids, a tensor, batches or a file"),
        ([], QuantizeError, "holds no row of two or more tokens"),
        ([[600, 1]], UsageError, "holds the token id 600; the model knows 0 to 511"),
        ([[1.5, 2]], UsageError, "where a text or a list of token ids is expected"),
        (["a text"], UsageError, "holds text, and the model has no tokenizer; give tokenizer=, or rows of input_ids"),
        ([{"a": "x", "b": "y"}], UsageError, "has rows of a, b; call one of them text, messages or input_ids"),
    ],
)
def test_data_that_the_model_cannot_take(data, error, words):
    with pytest.raises(error, match=words):
        read(data)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.json", "{", "is no JSON|cannot be read"),
        ("a.json", '{"a": [], "b": []}', "holds no list of texts or rows"),
        ("a.parquet", "PAR1", "cannot be read"),
        ("a.csv", 'text\n"a', "cannot be read"),
        ("a.pt", "x", "cannot be read"),
    ],
)
def test_damaged_files(name, content, words, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(QuantizeError, match=words):
        read(tmp_path / name)


def test_images_in_memory():
    images = torch.rand(3, 3, 4, 4)
    for data in (images, {"pixel_values": images}, [images[:2], images[2:]], [{"pixel_values": images}]):
        found = read(data, inputs=IMAGES)
        assert torch.equal(torch.stack([row["pixel_values"] for row in found.rows]), images)
    with pytest.raises(UsageError, match=r"the model takes pixel_values .*; give a tensor of each"):
        read(["text"], inputs=IMAGES)


def test_a_directory_of_datasets_is_read_file_by_file(tokenize, tmp_path):
    """Streams of Arrow as `save_to_disk` writes them, files of Arrow, Parquet; those for training if there are any."""
    table = pyarrow.Table.from_pylist([{"text": text} for text in TEXTS])
    saved = tmp_path / "saved"
    (saved / "train").mkdir(parents=True)
    (saved / "test").mkdir()
    for number, part in enumerate((table.slice(0, 2), table.slice(2))):
        with pyarrow.ipc.new_stream(str(saved / "train" / f"data-0000{number}-of-00002.arrow"), table.schema) as writer:
            writer.write_table(part)
    with pyarrow.ipc.new_file(str(saved / "test" / "data-00000-of-00001.arrow"), table.schema) as writer:
        writer.write_table(table.slice(1))
    (saved / "train" / "cache-1234.arrow").write_bytes(b"computed from others")
    assert ids(read(saved, tokenize)) == ids(read(TEXTS, tokenize))
    assert ids(read(saved / "test", tokenize)) == ids(read(TEXTS[1:], tokenize))
    pyarrow.parquet.write_table(table, tmp_path / "saved" / "test" / "more.parquet")
    assert len(read(saved / "test", tokenize).rows) == 5
    with pytest.raises(UsageError, match=r"holds no \.arrow and no \.parquet files"):
        read(make(tmp_path / "empty"), tokenize)
    (make(tmp_path / "links") / "a.parquet").symlink_to(saved / "test" / "more.parquet")
    with pytest.raises(UsageError, match="is a link out of the directory"):
        read(tmp_path / "links", tokenize)
    (make(tmp_path / "bad") / "a.arrow").write_bytes(b"nothing")
    with pytest.raises(QuantizeError, match=r"a\.arrow cannot be read"):
        read(tmp_path / "bad", tokenize)


def make(directory):
    directory.mkdir()
    return directory


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl"])
def test_a_column_is_named(name, stories, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(stories)
    tokenizer.chat_template = TEMPLATE
    tokenize = tokenize_with(tokenizer)
    messages = [{"role": "user", "content": "Who is Tom?"}]
    rows = [{"story": text, "text": "no", "talk": messages, "number": 1} for text in TEXTS]
    path = write(tmp_path / name, rows)

    def column(found, data=path):
        return ids(read_source(data, INPUTS, 16, 8, tokenize, 512, found))

    assert column("story") == column("story", rows) == ids(read(TEXTS, tokenize))
    assert column("talk")[0] == ids(read([{"messages": messages}], tokenize))[0]
    with pytest.raises(UsageError, match="has rows of story, text, talk, number; give one of these as --text-column"):
        column("stories")
    with pytest.raises(UsageError, match="has 1 in the column 'number'; name a column of texts or messages"):
        column("number")
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(UsageError, match=r"a\.txt has no columns"):
        column("story", tmp_path / "a.txt")


def test_a_data_set_of_the_hub_is_streamed(monkeypatch, tokenize, tmp_path):
    asked = []

    def load_dataset(*arguments, **options):
        asked.append((*arguments, options))
        if "none" in arguments[0]:
            raise ValueError("no such data set")
        return iter([{"text": text} for text in TEXTS])

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert ids(read("someone/stories:small:test", tokenize)) == ids(read(TEXTS, tokenize))
    assert asked == [("someone/stories", "small", {"split": "test", "streaming": True})]
    read("someone/stories", tokenize)
    assert asked[1] == ("someone/stories", None, {"split": "train", "streaming": True})
    with pytest.raises(UsageError, match=r"no data set that the hub gives .*no such data set.*; give owner/name"):
        read("someone/none", tokenize)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UsageError, match=r"needs the package datasets; install it with pip install"):
        read("someone/stories", tokenize)
    with pytest.raises(UsageError, match="no such file"):
        read(tmp_path / "missing.jsonl", tokenize)
    assert not is_data_set("tests/missing")  # a file that is missing in a folder that is here
