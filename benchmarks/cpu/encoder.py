"""An encoder of sentences runs in ONNX Runtime, float and quantized, and is scored by how well it ranks pairs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from quantize.checkpoint.opening import open_checkpoint
from quantize.checkpoint.tokenizer import load_tokenizer
from quantize.eval.similarity import BATCH, Pairs, correlation
from quantize.export.directory import export_artifact
from quantize.export.onnx.export import export_onnx
from quantize.export.onnx.runtime.session import session_of
from quantize.pipeline.quantize import quantize_model

SCHEMES = ("W8A8", "W4A8")
FLOAT = "float32"
Batch = dict[str, NDArray[Any]]


def make_encoders(model: Path, folder: Path) -> dict[str, Path]:
    """Make a directory with `model.onnx` for the float model and for recipes with one scale for each channel."""
    found = {name: folder / name for name in (FLOAT, *SCHEMES)}
    found[FLOAT].mkdir()
    export_onnx(open_checkpoint(str(model)).load(), found[FLOAT])
    for scheme in SCHEMES:
        artifact = folder / f"{scheme}.artifact"
        quantize_model(str(model), scheme=scheme, output_dir=artifact, group_size=0, nsamples=32, seqlen=128)
        export_artifact(artifact, "onnx", found[scheme])
    return found


def write_batches(model: Path, pairs: Pairs, path: Path) -> int:
    """Write both sentences of all pairs, sorted by length, for `read_batches`; return the number of batches."""
    tokenizer, texts = load_tokenizer(model), sentences(pairs)
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    arrays: Batch = {}
    for start in range(0, len(order), BATCH):
        chosen = order[start : start + BATCH]
        given = tokenizer([texts[i] for i in chosen], padding=True, truncation=True, return_tensors="np")
        arrays |= {f"{start:06}/{name}": values.astype(np.int64) for name, values in given.items()}
        arrays[f"{start:06}/"] = np.array(chosen)
    np.savez(path, allow_pickle=False, **arrays)
    return -(-len(order) // BATCH)


def read_batches(path: Path) -> list[Batch]:
    """Return the inputs of each batch, by name."""
    return [{name: values for name, values in batch.items() if name} for batch in batches_of(path)]


def batches_of(path: Path) -> list[Batch]:
    """Return the inputs of each batch, and under an empty name the numbers of its sentences."""
    with np.load(path, allow_pickle=False) as held:
        numbers = sorted({key.split("/")[0] for key in held})
        return [{key.split("/")[1]: held[key] for key in held if key.startswith(number)} for number in numbers]


def spearman(directory: Path, batches: Path, pairs: Pairs) -> float:
    """Return the correlation of the gold scores with the cosine similarity of mean hidden states."""
    session, rows = session_of(directory), torch.empty(0)
    for batch in batches_of(batches):
        chosen = batch.pop("")
        hidden, mask = session.run(None, batch)[0], batch["attention_mask"][..., None]
        means = torch.from_numpy((hidden * mask).sum(1) / mask.sum(1)).float()
        rows = rows if len(rows) else torch.empty(2 * len(pairs), means.shape[1])
        rows[torch.from_numpy(chosen)] = means
    return correlation(rows.unflatten(0, (2, -1)), pairs)


def sentences(pairs: Pairs) -> list[str]:
    """Return the first sentences of all pairs, then the second ones."""
    _, first, second = zip(*pairs, strict=True)
    return [*first, *second]
