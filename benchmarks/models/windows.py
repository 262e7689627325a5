"""Every cell of a model is calibrated and scored on the same token ids, which are written to files once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from quantize.calibration.data import BUNDLED, read_samples
from quantize.checkpoint.tokenizer import load_tokenize, load_tokenizer

PROMPT = "The old man looked at the letter on the table and said,"
WINDOW, WINDOWS = 256, 16


def write_calibration(model: Path, path: Path, nsamples: int, seqlen: int) -> None:
    """Write the windows of the bundled prose that the package takes by default, a row of `input_ids` in each line."""
    samples = read_samples(BUNDLED, seqlen, nsamples, load_tokenize(model), vocabulary(model))
    rows = (json.dumps({"input_ids": row["input_ids"].tolist()}) for row in samples.rows)
    path.write_text("\n".join(rows) + "\n")


def write_evaluation(model: Path, path: Path, texts: list[Path], window: int = WINDOW, windows: int = WINDOWS) -> None:
    """Write the ids of a prompt, and those of some windows of each text, by the text's name.

    Windows begin with the token that the model's tokenizer begins texts with, if there is one: Gemma is lost without.
    """
    found, prompt = dict[str, list[list[int]]](), load_tokenizer(model)(PROMPT)["input_ids"]
    for text in texts:
        samples = read_samples(text, window, windows, load_tokenize(model), vocabulary(model))
        found[text.stem] = [row["input_ids"].tolist() for row in samples.rows]
    path.write_text(json.dumps({"prompt": prompt, "texts": found}))


def read_windows(model: Path, text: Path) -> list[Tensor]:
    """Return the ids [1, WINDOW] of some windows of a text."""
    samples = read_samples(text, WINDOW, WINDOWS, load_tokenize(model), 2**31)
    return [row["input_ids"][None] for row in samples.rows]


def vocabulary(model: Path) -> int:
    """Return the number of tokens that a model knows."""
    config: dict[str, Any] = json.loads((model / "config.json").read_text())
    return int(config["vocab_size"])
