"""The bundled books are split into what the mixture is trained on and what it is judged by."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from quantize.calibration.data import BUNDLED
from quantize.checkpoint.tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parents[2]
TEACHER = ROOT / "tests" / "models" / "books-llama-6m"
BOOKS = ROOT / "tests" / "data" / "books" / "heldout.txt"
WINDOW = 256
JUDGED = 32  # windows that the mixture is judged by
TRAINED = 0.8  # the part of the text, from its beginning, that is trained on besides the bundled prose


def parts() -> tuple[str, str]:
    """Return the text to train on, and the text that is never seen, of other books but for one."""
    text = BOOKS.read_text()
    cut = text.index("\n\n", int(TRAINED * len(text)))
    return BUNDLED.read_text() + text[:cut], text[cut:].strip()


def windows(text: str) -> Tensor:
    """Return the tokens of a text in windows, int64 [n, WINDOW]."""
    ids = torch.tensor(load_tokenizer(TEACHER)(text)["input_ids"])
    return ids[: len(ids) // WINDOW * WINDOW].view(-1, WINDOW)


def training_windows() -> Tensor:
    """Return the windows that the mixture is trained on."""
    return windows(parts()[0])


def unseen_windows() -> Tensor:
    """Return the windows that the mixture is judged by."""
    return windows(parts()[1])[:JUDGED]
