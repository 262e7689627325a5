"""`make bench-diffusion` trains a small masked-diffusion language model, and measures what masked calibration gains.

The model is books-llama-6m without its causal mask, which learns in some minutes to find masked tokens (LLaDA, arXiv
2502.09992; from a causal model as in arXiv 2410.17891). QDLM (arXiv 2508.14896) calibrates such models on masked text.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
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
LENGTH, BATCH, STEPS, RATE = 128, 8, 250, 1e-3
CALIBRATION, WINDOWS = 64, 64
SCHEMES = ("W4A16", "W4A8", "W4A4")
PLAIN, UNMASKED, MASKED = "plain rounding", "default, unmasked", "default, masked"
RECIPES: dict[str, dict[str, Any]] = {
    PLAIN: {"passes": [], "quantizer": {"name": "rtn"}},
    UNMASKED: {},
    MASKED: {"calibration": {"mask_id": MASK}},
}
RESULTS = TESTS.parent / "benchmarks" / "results"
HEAD = """# A masked-diffusion language model, calibrated on masked and on unmasked text

`make bench-diffusion` wrote this file and `diffusion.json`: books-llama-6m without its causal mask, trained for
{steps} steps to find masked tokens. Its loss is {loss:.4f} on the masked tokens of {windows} unseen windows of
{length} tokens, a tenth to nine tenths of each. Weights are per channel, and the calibration data {rows} windows of
the bundled prose, as they are or with a part of each masked, drawn from 0.1 to 0.9
(`calibration = {{ mask_id = {mask} }}`). Increases are in nats a masked token, with the same masks in all rows, and of
one seed.

| scheme | recipe | loss increase | KL | top-1 |
|---|---|---|---|---|
"""
Row = dict[str, Any]


def main() -> None:
    """Train the model, and measure the loss on masked tokens of unseen text that the results lack, each once."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=STEPS, help="steps of training")
    steps, path = parser.parse_args().steps, RESULTS / "diffusion.json"
    found: list[Row] = json.loads(path.read_text()) if path.is_file() else []
    rows = {(row["scheme"], row["recipe"]): row for row in found if row["steps"] == steps}
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        train(model, steps)
        for scheme, (name, recipe) in itertools.product(SCHEMES, RECIPES.items()):
            if (scheme, name) not in rows:
                scores = score(model, Path(folder) / "out", scheme, recipe)
                rows[scheme, name] = {"steps": steps, "scheme": scheme, "recipe": name, **scores}
                path.write_text(json.dumps(list(rows.values()), indent=1) + "\n")
                (RESULTS / "diffusion.md").write_text(markdown(list(rows.values()), steps))
    print(markdown(list(rows.values()), steps))


def score(model: Path, output: Path, scheme: str, recipe: Mapping[str, Any]) -> dict[str, float]:
    """Return the scores of a quantized model on masked tokens of unseen text."""
    quantize_model(
        model, output_dir=output, scheme=scheme, recipe=recipe, group_size=0, nsamples=CALIBRATION, seqlen=LENGTH
    )
    found = evaluate(output, TEXT, str(model), LENGTH, WINDOWS, mask_id=MASK)
    shutil.rmtree(output)
    return {name: float(found[name]) for name in ("loss_against", "loss_increase", "kl", "top1")}


def markdown(rows: Sequence[Row], steps: int) -> str:
    """Return the table, and below it what masking gains."""
    text = HEAD.format(
        steps=steps, loss=rows[0]["loss_against"], windows=WINDOWS, length=LENGTH, rows=CALIBRATION, mask=MASK
    )
    for row in rows:
        figures = f"{row['loss_increase']:+.4f} | {row['kl']:.4f} | {row['top1']:.3f}"
        text += f"| {row['scheme']} | {row['recipe']} | {figures} |\n"
    found = {(row["scheme"], row["recipe"]): row["loss_increase"] for row in rows}
    gains = [
        f"{found[scheme, UNMASKED] - found[scheme, MASKED]:+.4f} at {scheme}"
        for scheme in SCHEMES
        if {(scheme, UNMASKED), (scheme, MASKED)} <= found.keys()
    ]
    return f"{text}\nMasked calibration gains {', '.join(gains)}.\n" if gains else text


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
