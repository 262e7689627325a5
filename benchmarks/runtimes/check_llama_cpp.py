"""`make test-llama-cpp` loads exported GGUF files in llama.cpp and compares logits, greedy tokens and token ids."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from benchmarks.runtimes.peer import call
from benchmarks.runtimes.tiny_models import BOOKS, TEXT, make_tiny
from quantize.artifact.load import load
from quantize.checkpoint.tokenizer import load_tokenize
from quantize.export.comparison import (
    copy_with_replaced_linears,
    first_outputs,
    relative_error,
    with_float_activations,
)  # fmt: skip
from quantize.export.directory import export_artifact
from quantize.pipeline.quantize import quantize_model

PEER, NEW_TOKENS, LENGTH, ROWS = "llama_cpp_peer", 12, 48, 3
# llama.cpp rounds activations to 8 bits and keeps keys and values in float16; a wrong order of rows makes an error of 1
LARGEST_ERROR, LEAST_AGREEMENT = 0.04, 0.9
TEXTS = [
    "The old man looked at the letter on the table and said, 'I've no idea.'",
    "  Twenty-three   spaces,\n\n\tnew lines and 12345 digits 6 7 89!? ... --",
    "Ünïcödé, 漢字 and 🚀 emojis; don't WE'LL it's\r\n",
]
ZEROS = {"weights": {"symmetric": False}}
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {  # name → model, scheme, recipe
    "Q4_0": ("", "W4A16", {}),
    "Q4_1": ("", "W4A16", ZEROS),
    "Q8_0": ("", "W8A8", {}),
    "MXFP4": ("", "MXFP4", {}),
    "NVFP4": ("", "NVFP4", {}),
    "IQ4_NL": ("", "W4A16", {"weights": {"format": "iq4_nl"}}),
    "qwen2 Q4_0": ("qwen2", "W4A16", {}),
    "qwen3 Q4_0": ("qwen3", "W4A16", {}),
    "gemma3 Q4_0": ("gemma3_text", "W4A16", {}),
}


@click.command()
@click.option("--peer", required=True, help="A Python with llama-cpp-python.")
@click.option("--model", "models", type=click.Path(path_type=Path), multiple=True, help="Further models, as Q4_0.")
def main(peer: str, models: tuple[Path, ...]) -> None:
    """Check every case and end with 1 if one of them differs."""
    cases = CASES | {f"{path.name} Q4_0": (str(path), "W4A16", {}) for path in models}
    with tempfile.TemporaryDirectory() as scratch:
        failed = [name for name, case in cases.items() if not check(peer, name, *case, Path(scratch))]
    sys.exit(bool(failed))


def check(peer: str, name: str, kind: str, scheme: str, recipe: dict[str, Any], scratch: Path) -> bool:
    """Quantize a model, export it, run it in llama.cpp, print how far it is from the artifact, and judge.

    The artifact runs with activations in floating point, as they are no part of the file.
    """
    folder = scratch / name.replace(" ", "-")
    model = BOOKS if not kind else Path(kind) if "/" in kind else make_tiny(kind, folder / "model")
    settings = {"quantizer": {"name": "rtn"}, **recipe}
    artifact = quantize_model(
        model, output_dir=folder / "artifact", scheme=scheme, target="llama.cpp", recipe=settings, calibration=TEXT,
        nsamples=2, seqlen=32,
    )  # fmt: skip
    export_artifact(artifact.directory, "gguf", folder / "gguf")
    tokenize = load_tokenize(model)
    own = copy_with_replaced_linears(load(artifact.directory), with_float_activations)
    assert tokenize is not None
    ids = tokenize(TEXT.read_text()[:4000])
    rows = [ids[start : start + LENGTH] for start in range(0, ROWS * LENGTH, LENGTH)]
    found = call(peer, PEER, "outputs", model=str(folder / "gguf" / "model.gguf"), rows=rows, texts=TEXTS,
                 new=NEW_TOKENS, logits=str(folder / "logits.npy"))  # fmt: skip
    given, inputs = torch.from_numpy(np.load(folder / "logits.npy")), torch.tensor(rows)
    expected = first_outputs(own, [{"input_ids": inputs}])[0]
    generate: Any = own.generate
    mask = torch.ones_like(inputs)
    tokens = generate(
        inputs, attention_mask=mask, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False
    )
    error = relative_error([given[..., : expected.shape[-1]]], [expected])
    agreement = float((given.argmax(-1) == expected.argmax(-1)).float().mean())
    greedy = float(np.mean(np.array(found["greedy"]) == tokens[:, LENGTH:].numpy()))
    same_ids = found["ids"] == [tokenize.whole(text) for text in TEXTS]
    right = error < LARGEST_ERROR and agreement >= LEAST_AGREEMENT and same_ids
    click.echo(
        f"{name:24} logits differ by {error:.4f}, top-1 {agreement:.3f}, greedy tokens {greedy:.3f}, "
        f"ids {'equal' if same_ids else 'differ'}: {'ok' if right else 'FAILED'}"
    )
    return right


if __name__ == "__main__":
    main()
