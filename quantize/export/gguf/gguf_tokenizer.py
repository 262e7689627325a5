"""A GGUF file holds the tokenizer, with a name by which llama.cpp knows how text is split before merges.

The name comes from what the loaded tokenizer says of the split, as llama.cpp has a function for each name.
Source: llama.cpp, `src/llama-vocab.cpp`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from gguf import GGUFWriter, SpecialVocab, TokenType

from quantize.checkpoint.tokenizer import load_tokenize, load_tokenizer, readable
from quantize.export.base import Obstacle

FILE = "tokenizer.json"
SPACE = "▁"  # what stands for a space where bytes have no letters of their own
LONGEST_RUN = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
BYTES, BYTES_OF_WORDS = ("ByteLevel", False), ("ByteLevel", True)
SPLITS: dict[tuple[tuple[str, object], ...], str] = {
    (BYTES_OF_WORDS,): "gpt-2",
    (("Digits", True), BYTES_OF_WORDS): "smollm",
    (("Split", rf"{WORDS}\p{{N}}{LONGEST_RUN}"), BYTES): "qwen2",
    (("Split", rf"{WORDS}\p{{N}}{{1,3}}{LONGEST_RUN}"), BYTES): "llama-bpe",
}
IGNORES_MERGES = {"llama-bpe"}  # a word that is a token is taken whole
UNMERGED = -1e9  # the score of a token that no merge makes


class Token(NamedTuple):
    """A token: its text, its kind, and its score where a score says which tokens are merged first."""

    text: str
    kind: TokenType = TokenType.NORMAL
    score: float = UNMERGED


def tokenizer_obstacles(directory: Path | None) -> Iterator[Obstacle]:
    """Yield why llama.cpp could not split text as the tokenizer of a model does."""
    if directory is None or not (directory / FILE).is_file():
        yield Obstacle(f"a GGUF file holds the tokenizer, and the model has no {FILE}", "save the tokenizer beside it")
        return
    with readable(directory):
        split = split_of(read_tokenizer(directory))
    if split is None:
        known = ", ".join((*SPLITS.values(), "SentencePiece"))
        reason = f"llama.cpp has no name for how {FILE} splits text; known are the splits of {known}"
        yield Obstacle(reason, "run the artifact itself, or export it to another target")


def read_tokenizer(directory: Path) -> dict[str, Any]:
    """Return what `tokenizer.json` says, as transformers has it after loading: some classes split text as they like.

    Raises:
        QuantizeError: the tokenizer cannot be read.
    """
    tokenizer = load_tokenizer(directory)
    with readable(directory):
        found: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    return found


def split_of(tokenizer: Mapping[str, Any]) -> str | None:
    """Return llama.cpp's name for how a tokenizer splits text, `default` for SentencePiece's; None without one."""
    model, steps = tokenizer["model"], tuple(map(signature, sequence(tokenizer.get("pre_tokenizer"), "pretokenizers")))
    normalizers = [x["type"] for x in sequence(tokenizer.get("normalizer"), "normalizers")]
    if model["type"] != "BPE":
        return None
    if model.get("byte_fallback"):
        whole = all(name == "Metaspace" or rest == " " for name, rest in steps)
        return "default" if whole and set(normalizers) <= {"Prepend", "Replace"} else None
    name = SPLITS.get(steps)
    fits = bool(model.get("ignore_merges")) == (name in IGNORES_MERGES) and set(normalizers) <= {"NFC"}
    return name if fits else None


def sequence(part: Mapping[str, Any] | None, key: str) -> list[dict[str, Any]]:
    """Return the steps of a part of a tokenizer, which may be one step or a sequence of them."""
    return [] if part is None else list(part[key]) if part["type"] == "Sequence" else [dict(part)]


def signature(step: Mapping[str, Any]) -> tuple[str, object]:
    """Return the type of a step of a pre-tokenizer, with what distinguishes it; None where it does something else."""
    kind = str(step["type"])
    if kind == "ByteLevel":
        return kind, None if step.get("add_prefix_space") else bool(step.get("use_regex", True))
    if kind == "Digits":
        return kind, bool(step.get("individual_digits"))
    if kind == "Split":
        pattern = step["pattern"]
        isolated = step.get("behavior") == "Isolated" and not step.get("invert")
        return kind, pattern.get("Regex") if isolated else pattern.get("String")
    return ("Metaspace", None) if kind == "Metaspace" and not step.get("split", True) else ("unknown", None)


def add_tokenizer(writer: GGUFWriter, directory: Path, count: int) -> None:
    """Add the tokenizer of a directory in which `tokenizer_obstacles` finds nothing.

    Args:
        writer: the writer of the file.
        directory: where `tokenizer.json`, the chat template and the settings of special tokens are.
        count: the number of rows of the table of words; ids without a token get one that is never used.
    """
    with readable(directory):  # whatever is wrong with its parts
        tokenizer = read_tokenizer(directory)
        split, tokens = split_of(tokenizer), tokens_of(tokenizer, count)
        assert split is not None
        has_scores = split == "default"
        writer.add_tokenizer_model("llama" if has_scores else "gpt2")
        writer.add_tokenizer_pre(split)
        writer.add_token_list([token.text for token in tokens])
        writer.add_token_types([token.kind for token in tokens])
        if has_scores:
            writer.add_token_scores([token.score for token in tokens])
            writer.add_add_space_prefix(has_leading_space(tokenizer))
        special, tokenize = SpecialVocab(directory, load_merges=not has_scores, n_vocab=count), load_tokenize(directory)
        special.add_special_token = {
            "bos": bool(tokenize and tokenize.leading),
            "eos": bool(tokenize and tokenize.trailing),
        }
        special.add_to_gguf(writer, quiet=True)


def has_leading_space(tokenizer: Mapping[str, Any]) -> bool:
    """Return whether a tokenizer puts a space in front of each text."""
    steps = (
        *sequence(tokenizer.get("normalizer"), "normalizers"),
        *sequence(tokenizer.get("pre_tokenizer"), "pretokenizers"),
    )
    return any(step["type"] == "Prepend" or step.get("prepend_scheme", "never") != "never" for step in steps)


def tokens_of(tokenizer: Mapping[str, Any], count: int) -> list[Token]:
    """Return the tokens by id. The score of a token is the lower, the later the first merge is that makes it."""
    model = tokenizer["model"]
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(model["merges"] if model.get("byte_fallback") else ()):
        ranks.setdefault("".join(merge if isinstance(merge, list) else merge.split(" ", 1)), rank)
    tokens = [Token(f"[PAD{number}]", TokenType.UNUSED) for number in range(count)]
    for text, number in model["vocab"].items():
        kind = TokenType.NORMAL
        if model.get("byte_fallback") and len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
            kind = TokenType.BYTE
        tokens[number] = Token(text, kind, -float(ranks[text]) if text in ranks else UNMERGED)
    for added in tokenizer.get("added_tokens", ()):
        kind = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
        text = added["content"] if added["special"] else added["content"].replace(SPACE, " ")
        tokens[added["id"]] = Token(text, TokenType.UNKNOWN if text == model.get("unk_token") else kind)
    return tokens
