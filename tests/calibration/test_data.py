"""Calibration and evaluation text: windows, rows, and what is wrong with them."""

from __future__ import annotations

import hashlib
import json

import pytest
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing

from quantize.calibration import data
from quantize.calibration.data import BUNDLED, read_samples
from quantize.checkpoint.tokenizer import SpecialToken, Tokenize, around, load_tokenize
from quantize.errors import QuantizeError, UsageError


def encode(text):
    return [ord(letter) - ord("a") for letter in text]


letters = Tokenize(encode)
AROUND = Tokenize(encode, (SpecialToken(24, "<bos>"),), (SpecialToken(25, "<eos>"),))


def write(path, *rows):
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return path


def ids(samples):
    return [row["input_ids"].tolist() for row in samples.rows]


def test_text_is_cut_into_whole_windows_in_order(tmp_path):
    path = write(tmp_path / "a.txt", "abcdefghij")
    samples = read_samples(path, 4, None, letters, 26)
    assert ids(samples) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert all(row["input_ids"].dtype == torch.int64 for row in samples.rows)
    assert samples.tokens == 8
    assert samples.sha256 == hashlib.sha256(b"abcdefghij").hexdigest()
    assert ids(read_samples(path, 10, None, letters, 26)) == [list(range(10))]


def test_fewer_windows_are_spread_evenly_over_the_text(tmp_path):
    path = write(tmp_path / "a.txt", "abcdefghijklmnopqrst")
    assert [row[0] for row in ids(read_samples(path, 2, 5, letters, 26))] == [0, 4, 8, 12, 16]
    assert len(ids(read_samples(path, 2, 100, letters, 26))) == 10


def test_rows_hold_ids_or_text(tmp_path):
    path = write(tmp_path / "a.jsonl", {"input_ids": [5, 6, 7, 8]}, "\n", {"text": "abc", "source": "ignored"})
    assert ids(read_samples(path, 3, None, letters, 26)) == [[5, 6, 7], [0, 1, 2]]


def test_windows_begin_with_what_the_tokenizer_puts_in_front(tmp_path):
    path = write(tmp_path / "a.txt", "abcdefghij")
    samples = read_samples(path, 4, None, AROUND, 26)
    assert ids(samples) == [[24, 0, 1, 2], [24, 3, 4, 5], [24, 6, 7, 8]]
    assert samples.leading == AROUND.leading
    assert samples.size() == "12 tokens, each row behind <bos>"
    assert samples.size_record() == {"rows": 3, "tokens": 12, "leading_tokens": [24]}
    assert read_samples(path, 4, None, letters, 26).size() == "8 tokens"
    assert read_samples(path, 4, None, letters, 26).size_record() == {"rows": 2, "tokens": 8}
    assert ids(read_samples(path, 11, None, AROUND, 26)) == [[24, *range(10)]]
    with pytest.raises(QuantizeError, match="holds 11 tokens, less than one window of 12"):
        read_samples(path, 12, None, AROUND, 26)


def test_rows_of_text_get_all_special_tokens_and_rows_of_ids_none(tmp_path):
    path = write(tmp_path / "a.jsonl", {"text": "ab"}, {"text": "abcdef"}, {"input_ids": [24, 6, 7]})
    samples = read_samples(path, 4, None, AROUND, 26)
    assert ids(samples) == [[24, 0, 1, 25], [24, 0, 1, 2], [24, 6, 7]]
    assert samples.leading == AROUND.leading
    with path.open("a") as file:
        file.write('{"input_ids": [6, 7]}')
    samples = read_samples(path, 4, None, AROUND, 26)
    assert ids(samples)[-1] == [6, 7]
    assert samples.leading == ()  # not all rows begin with it


def test_a_window_must_have_room_for_text(tmp_path):
    path, two = write(tmp_path / "a.txt", "abcdef"), Tokenize(encode, AROUND.leading * 2)
    with pytest.raises(UsageError, match=r"--seqlen 2 leaves no room for text behind .* 2 special tokens; give 3 or"):
        read_samples(path, 2, None, two, 26)
    assert ids(read_samples(path, 3, 1, two, 26)) == [[24, 24, 0]]


def test_rows_of_less_than_two_tokens_are_left_out(tmp_path):
    path = write(tmp_path / "a.jsonl", {"input_ids": [5]}, {"input_ids": []}, {"input_ids": [1, 2]})
    assert ids(read_samples(path, 8, None, None, 26)) == [[1, 2]]


def test_batches_hold_neighbours_of_equal_length_and_nothing_is_lost(tmp_path):
    rows = [[1, 2], [3, 4], [5, 6], [1, 2, 3], [7, 8]]
    samples = read_samples(write(tmp_path / "a.jsonl", *({"input_ids": row} for row in rows)), 8, None, None, 26)
    batches = [batch["input_ids"] for batch in samples.batches(2)]
    assert [list(batch.shape) for batch in batches] == [[2, 2], [1, 2], [1, 3], [1, 2]]
    assert [row.tolist() for batch in batches for row in batch] == rows


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "no JSON",
        "[1, 2]",
        "7",
        '"input_ids"',
        "{}",
        '{"input_ids": "1 2"}',
        '{"input_ids": [1, "2"]}',
        '{"input_ids": [1, 2.0]}',
        '{"input_ids": [true, false]}',
        '{"input_ids": [[1, 2]]}',
        '{"text": null}',
        '{"text": 12}',
        pytest.param('{"input_ids": [1, ' + "9" * 5000 + "]}", id="a number of 5000 digits"),
        pytest.param("[" * 100_000, id="brackets without end"),
    ],
)
def test_a_malformed_line_is_named(tmp_path, line):
    path = write(tmp_path / "a.jsonl", {"input_ids": [1, 2]}, line + "\n")
    with pytest.raises(UsageError, match=r'a\.jsonl line 2 is no JSON object with "text" or a list of integers'):
        read_samples(path, 8, None, letters, 26)


@pytest.mark.parametrize("wrong", [26, -1, 10**30])
def test_ids_outside_the_vocabulary_are_named_with_what_is_allowed(tmp_path, wrong):
    path = write(tmp_path / "a.jsonl", {"input_ids": [25, 0, wrong]})
    with pytest.raises(UsageError, match=rf"holds the token id {wrong}; the model knows 0 to 25"):
        read_samples(path, 8, None, None, 26)
    assert ids(read_samples(path, 2, None, None, 26)) == [[25, 0]]


@pytest.mark.parametrize(("name", "content"), [("a.txt", "abc"), ("a.jsonl", '{"text": "abc"}\n')])
def test_text_needs_a_tokenizer(tmp_path, name, content):
    with pytest.raises(UsageError, match=r"holds text, and the model has no tokenizer; give a \.jsonl"):
        read_samples(write(tmp_path / name, content), 2, None, None, 26)


@pytest.mark.parametrize(
    ("name", "content", "kind", "words"),
    [
        ("a.txt", b"", QuantizeError, "holds 0 tokens, less than one window of 8"),
        ("a.txt", b"abcdefg", QuantizeError, "holds 7 tokens, less than one window of 8; give more text or a smaller"),
        ("a.txt", b"\xff\xfe", UsageError, "is not UTF-8"),
        ("a.jsonl", b"", QuantizeError, "holds no row of two or more tokens"),
        ("a.jsonl", b"\n \n", QuantizeError, "holds no row of two or more tokens"),
        ("a.jsonl", b"\xff\n", UsageError, "line 1 is no JSON object"),
        ("a.csv", b"abc", UsageError, r"neither \.txt nor \.jsonl"),
        ("missing.txt", None, UsageError, "no such text file"),
    ],
)
def test_a_file_without_usable_text_is_refused(tmp_path, name, content, kind, words):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(QuantizeError, match=words) as raised:
        read_samples(tmp_path / name, 8, None, letters, 26)
    assert type(raised.value) is kind
    assert name in str(raised.value)


def test_a_directory_is_no_text(tmp_path):
    with pytest.raises(UsageError, match="no such text file"):
        read_samples(tmp_path, 8, None, letters, 26)


def test_bundled_text_fills_the_default_windows_of_a_real_tokenizer(books):
    samples = read_samples(BUNDLED, 256, 128, load_tokenize(books), 4096)
    assert {len(row["input_ids"]) for row in samples.rows} == {256}
    assert len(samples.rows) == 128


def test_the_tokenizer_says_what_it_puts_around_a_text(books, stories, minilm):
    """The books' tokenizer knows a token that begins texts and puts none in front."""
    from transformers import AutoTokenizer

    expected = {books: ([], []), stories: (["<s>"], []), minilm: (["[CLS]"], ["[SEP]"])}
    for directory, names in expected.items():
        tokenize, text = load_tokenize(directory), "The gentleman had never seen the sea."
        assert ([x.text for x in tokenize.leading], [x.text for x in tokenize.trailing]) == names
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
        assert tokenize.whole(text) == tokenizer(text)["input_ids"]


def test_windows_of_a_tokenizer_with_a_template(tmp_path):
    """Two tokens in front, as in GLM, and the words of a text."""
    words = {"[gMASK]": 0, "<sop>": 1, "a": 2, "sea": 3, "of": 4, "text": 5, "<unk>": 6}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(
        single="[gMASK] <sop> $A", special_tokens=[("[gMASK]", 0), ("<sop>", 1)]
    )
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path)
    path = write(tmp_path / "a.txt", "a sea of text a sea of")
    samples = read_samples(path, 5, None, load_tokenize(tmp_path), 7)
    assert ids(samples) == [[0, 1, 2, 3, 4], [0, 1, 5, 2, 3]]
    assert samples.size() == "10 tokens, each row behind [gMASK] <sop>"


@pytest.mark.parametrize(
    ("plain", "whole", "found"),
    [
        ([5], [5], ([], [])),
        ([5, 6], [1, 2, 5, 6, 3], ([1, 2], [3])),
        ([5], [5, 3], ([], [3])),
        ([], [1, 3], ([], [])),  # a tokenizer without a letter
        ([5], [1, 6, 3], ([], [])),
    ],
)
def test_special_tokens_are_what_stands_around_the_text(plain, whole, found):
    assert around(plain, whole) == found


def test_the_tokenizer_adds_no_special_tokens_and_reads_text_back(books, minilm, tmp_path):
    text = "The gentleman had never seen the sea."
    from transformers import AutoTokenizer

    for directory in (books, minilm):
        tokens = load_tokenize(directory)(text)
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
        assert not set(tokens) & set(tokenizer.all_special_ids)
        assert tokenizer.decode(tokens).lower() == text.lower()
    assert load_tokenize(tmp_path) is None
    assert load_tokenize(None) is None


@pytest.fixture
def small_pieces(monkeypatch):
    for name, size in {"PIECE": 16, "HEAD": 64, "HEAD_OF_ALL": 128, "LONGEST_LINE": 100}.items():
        monkeypatch.setattr(data, name, size)


def recorded(pieces):
    def encode(text):
        pieces.append(text)
        return [ord(letter) % 26 for letter in text]

    return Tokenize(encode)


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("the cat sat on the mat", ["the cat sat on", " the mat"]),
        ("abcdefgh" * 3, ["abcdefghabcdefg", "habcdefgh"]),
        ("é" * 12, ["é" * 7, "é" * 5]),
        (" " + "€" * 11, [" " + "€" * 4, "€" * 5, "€€"]),
        ("a b", ["a b"]),
        ("\0" * 17, ["\0" * 15, "\0\0"]),
    ],
)
def test_a_text_is_tokenized_in_pieces_cut_at_white_space(text, pieces, tmp_path):
    found = []
    samples = read_samples(write(tmp_path / "a.txt", text), 2, None, recorded(found), 26)
    assert found == pieces
    assert [i for row in ids(samples) for i in row] == [ord(x) % 26 for x in text][: len(text) // 2 * 2]


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize(("limit", "least"), [(1, 64), (5, 64), (14, 64), (30, 120), (10**9, 10_000), (None, 128)])
def test_of_a_large_text_is_read_what_is_needed_and_no_more(limit, least, tmp_path):
    text, pieces = "abcdefghijkl" * 833 + "abcd", []
    samples = read_samples(write(tmp_path / "a.txt", text), 4, limit, recorded(pieces), 26)
    read, rows = (samples.part or (len(text),))[0], ids(samples)
    assert least <= read < least + 16
    assert read == sum(map(len, pieces)) + (read < len(text))  # the last byte waits for the next piece
    assert samples.sha256 == hashlib.sha256(text[:read].encode()).hexdigest()
    assert samples.size().endswith(f", from the first {read} of 10,000 bytes" if read < len(text) else " tokens")
    assert samples.size_record().get("bytes_read", len(text)) == read
    whole = [[ord(x) % 26 for x in text[i : i + 4]] for i in range(0, sum(map(len, pieces)) - 3, 4)]
    assert rows == (
        whole if limit is None or limit >= len(whole) else [whole[i * len(whole) // limit] for i in range(limit)]
    )


@pytest.mark.usefixtures("small_pieces")
def test_of_many_rows_are_read_what_is_needed_and_no_more(tmp_path):
    path = write(tmp_path / "a.jsonl", *({"text": f"row{i % 10}"} for i in range(100)))
    size, line = path.stat().st_size, len('{"text": "row0"}\n')
    assert read_samples(path, 4, 2, recorded([]), 26).part == (4 * line, size)
    assert read_samples(path, 4, 7, recorded([]), 26).part == (7 * line, size)
    assert read_samples(path, 4, 200, recorded([]), 26).part is None
    assert len(read_samples(path, 4, 7, recorded([]), 26).rows) == 7


@pytest.mark.usefixtures("small_pieces")
def test_a_long_row_is_tokenized_no_further_than_its_window(tmp_path):
    pieces = []
    path = write(tmp_path / "a.jsonl", {"text": "abcdefgh" * 10})
    assert len(ids(read_samples(path, 20, None, recorded(pieces), 26))[0]) == 20
    assert len(pieces) == 2
    with pytest.raises(UsageError, match="line 1 has more than 100 bytes; give shorter lines"):
        read_samples(write(path, {"text": "abcdefgh" * 100}), 20, None, letters, 26)
