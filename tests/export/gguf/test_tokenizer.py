"""The name by which llama.cpp knows how text is split comes from what `tokenizer.json` says, and is never guessed."""

from __future__ import annotations

import json
import shutil

import pytest
from gguf import TokenType
from helpers.json_files import change_json

from quantize.errors import QuantizeError
from quantize.export.gguf.gguf_tokenizer import (
    has_leading_space,
    read_tokenizer,
    split_of,
    tokenizer_obstacles,
    tokens_of,
)

BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3 = QWEN2.replace(r"\p{N}| ?", r"\p{N}{1,3}| ?")


def split(regex, behavior="Isolated"):
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": behavior, "invert": False}


def bpe(*steps, normalizer=None, **model):
    pre = steps[0] if len(steps) == 1 else {"type": "Sequence", "pretokenizers": list(steps)}
    return {
        "model": {"type": "BPE", "vocab": {}, "merges": [], **model},
        "pre_tokenizer": pre,
        "normalizer": normalizer,
    }


DIGITS = {"type": "Digits", "individual_digits": True}
METASPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
WORDS, WHOLE = {**BYTE_LEVEL, "use_regex": True}, {**BYTE_LEVEL, "use_regex": False}
KNOWN = [
    ("gpt-2", bpe(WORDS)),
    ("smollm", bpe(DIGITS, WORDS)),
    ("qwen2", bpe(split(QWEN2), WHOLE, normalizer={"type": "NFC"})),
    ("llama-bpe", bpe(split(LLAMA3), WHOLE, ignore_merges=True)),
    ("default", bpe(METASPACE, byte_fallback=True)),
]
UNKNOWN = [
    bpe({**WORDS, "add_prefix_space": True}),
    bpe({**DIGITS, "individual_digits": False}, WORDS),
    bpe(split(QWEN2, "Removed"), WHOLE),
    bpe(split(QWEN2 + "|x"), WHOLE),
    bpe(split(LLAMA3), WHOLE),
    bpe(split(QWEN2), WHOLE, ignore_merges=True),
    bpe(WORDS, normalizer={"type": "Lowercase"}),
    bpe({**METASPACE, "split": True}, byte_fallback=True),
    bpe({"type": "Whitespace"}, byte_fallback=True),
    bpe(WORDS, type="WordPiece"),
]


@pytest.mark.parametrize(("name", "tokenizer"), KNOWN)
def test_known_splits(name, tokenizer):
    assert split_of(tokenizer) == name


@pytest.mark.parametrize("tokenizer", UNKNOWN)
def test_a_split_that_differs_a_little_has_no_name(tokenizer):
    assert split_of(tokenizer) is None


@pytest.fixture
def directory(books, tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        shutil.copy(books / name, tmp_path)
    return tmp_path


def test_a_tokenizer_of_another_split_is_refused(directory):
    assert not list(tokenizer_obstacles(directory))
    change_json(directory / "tokenizer.json", pre_tokenizer={"type": "Whitespace"})
    (found,) = tokenizer_obstacles(directory)
    assert str(found).startswith("llama.cpp has no name for how tokenizer.json splits text; known are the splits of gp")


def test_a_class_of_transformers_may_split_otherwise(books, directory):
    change_json(directory / "config.json", model_type="qwen2", architectures=["Qwen2ForCausalLM"])
    assert [split_of(read_tokenizer(path)) for path in (books, directory)] == ["gpt-2", "qwen2"]


def test_no_tokenizer_and_a_broken_one(tmp_path):
    for directory in (None, tmp_path):
        (found,) = tokenizer_obstacles(directory)
        assert str(found).startswith("a GGUF file holds the tokenizer, and the model has no tokenizer.json; save")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "tokenizer.json").write_text('{"model": 7}')
    with pytest.raises(QuantizeError, match=r"the tokenizer in .* cannot be used"):
        list(tokenizer_obstacles(tmp_path))


def test_tokens_of_sentencepiece(stories):
    tokenizer = json.loads((stories / "tokenizer.json").read_text())
    assert split_of(tokenizer) == "default"
    assert has_leading_space(tokenizer)
    tokens = tokens_of(tokenizer, 514)
    assert [token.kind for token in tokens[:4]] == [
        TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL, TokenType.BYTE,
    ]  # fmt: skip
    assert [token.text for token in tokens[512:]] == ["[PAD512]", "[PAD513]"]
    first, second = (next(x for x in tokens if x.text == "".join(merge)) for merge in tokenizer["model"]["merges"][:2])
    assert (first.score, second.score) == (0, -1)
    assert {x.score for x in tokens if x.kind == TokenType.BYTE} == {-1e9}


def test_tokens_of_bytes(books):
    tokenizer = json.loads((books / "tokenizer.json").read_text())
    tokens = tokens_of(tokenizer, 4096)
    assert (tokens[0].text, tokens[0].kind) == ("<|endoftext|>", TokenType.CONTROL)
    assert sum(token.kind == TokenType.NORMAL for token in tokens) == 4095
    assert not has_leading_space(tokenizer)


def test_a_token_that_was_added_and_is_not_special():
    tokenizer = bpe(WORDS, vocab={"a": 0})
    tokenizer["added_tokens"] = [{"id": 1, "content": "▁▁", "special": False}]
    assert tokens_of(tokenizer, 2)[1][:2] == ("  ", TokenType.USER_DEFINED)
