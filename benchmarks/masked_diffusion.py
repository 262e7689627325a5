"""`make bench-diffusion` trains a small masked-diffusion language model, and measures what masked calibration gains.

The model is books-llama-6m without its causal mask, which learns in some minutes to find masked tokens (LLaDA, arXiv
2502.09992; from a causal model as in arXiv 2410.17891). QDLM (arXiv 2508.14896) calibrates such models on masked text.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from quantize.calibration.data import BUNDLED, read_samples
from quantize.calibration.masking import LEAST, MOST, masked_places
from quantize.checkpoint.tokenizer import load_tokenize
from quantize.eval.report import evaluate
from quantize.pipeline.quantize import quantize_model

TESTS = Path(__file__).resolve().parents[1] / "tests"
MODEL, TEXT = TESTS / "models" / "books-llama-6m", TESTS / "data" / "books" / "heldout.txt"
MASK, VOCABULARY = 0, 4096  # the mask is the token between documents, which no window holds
LENGTH, BATCH, STEPS, RATE = 128, 8, 400, 1e-3
CALIBRATION, WINDOWS = 64, 32
SCHEMES = ("W4A16", "W4A8", "W4A4")


def main() -> None:
    """Train the model and print the loss on masked tokens of unseen text for each scheme and kind of calibration."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=STEPS, help="steps of training")
    steps, console, start = parser.parse_args().steps, Console(), time.perf_counter()
    table = Table("scheme", "recipe", "increase", "KL", "top-1", box=SIMPLE_HEAD)
    with tempfile.TemporaryDirectory() as folder:
        model, scores = Path(folder) / "model", dict[str, float]()
        train(model, steps)
        for scheme in SCHEMES:
            for name, recipe in (
                ("plain rounding", {"passes": [], "quantizer": {"name": "rtn"}}),
                ("default, unmasked", {}),
                ("default, masked", {"calibration": {"mask_id": MASK}}),
            ):
                output = Path(folder) / "out"
                quantize_model(
                    model, output_dir=output, scheme=scheme, recipe=recipe, group_size=0, nsamples=CALIBRATION,
                    seqlen=LENGTH,
                )  # fmt: skip
                scores = evaluate(output, TEXT, str(model), LENGTH, WINDOWS, mask_id=MASK)
                table.add_row(
                    scheme, name, f"{scores['loss_increase']:+.4f}", f"{scores['kl']:.4f}", f"{scores['top1']:.3f}"
                )
                shutil.rmtree(output)
    console.print(
        f"masked-diffusion model of {steps} steps, loss {scores['loss_against']:.4f} on masked tokens of unseen text, "
        f"{time.perf_counter() - start:.0f} s"
    )
    console.print(table)


def train(output: Path, steps: int) -> None:
    """Train books-llama-6m without its causal mask to find masked tokens, and write it with its tokenizer."""
    torch.manual_seed(0)
    shutil.copytree(MODEL, output)
    config = json.loads((output / "config.json").read_text())
    (output / "config.json").write_text(json.dumps(config | {"is_causal": False}))
    model = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)
    ids = torch.stack(
        [row["input_ids"] for row in read_samples(BUNDLED, LENGTH, None, load_tokenize(MODEL), VOCABULARY).rows]
    )
    rng, optimizer = np.random.default_rng(0), torch.optim.AdamW(model.parameters(), RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
    for step in range(steps):
        rows = ids[torch.from_numpy(rng.integers(len(ids), size=BATCH))]
        places = torch.stack([masked_places(LENGTH, rng.uniform(LEAST, MOST), rng) for _ in rows])
        logits = model(input_ids=torch.where(places, MASK, rows), use_cache=False).logits[places]
        loss = cross_entropy(logits, rows[places])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            print(f"step {step}: loss {float(loss.detach()):.3f}", flush=True)
    model.to(torch.bfloat16).save_pretrained(output)


if __name__ == "__main__":
    main()
