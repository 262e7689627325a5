"""`make bench-vit` trains a small ViT on scanned digits and measures what 6-bit handlers leave of its accuracy."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from quantize.calibration.logits import divergence
from quantize.pipeline.quantize import quantize_model

CONFIG = {
    "image_size": 8, "patch_size": 2, "num_channels": 1, "hidden_size": 64, "intermediate_size": 256,
    "num_hidden_layers": 4, "num_attention_heads": 4, "num_labels": 10,
}  # fmt: skip
HELD_OUT, EPOCHS, BATCH = 397, 30, 50
SHIFT = {"name": "noisy_bias", "mean_shift": True}
SYMMETRIC, FIXED = {"symmetric": True}, {"symmetric": False}
RTN = {"name": "rtn"}
RECIPES: dict[str, dict[str, Any]] = {
    "nothing, symmetric inputs": {"passes": [], "quantizer": RTN, "activations": SYMMETRIC},
    "noisy bias": {"passes": [{"name": "noisy_bias"}], "quantizer": RTN, "activations": SYMMETRIC},
    "noisy bias and shift": {"passes": [SHIFT], "quantizer": RTN, "activations": SYMMETRIC},
    "nothing, zero point": {"passes": [], "quantizer": RTN, "activations": FIXED},
    "noisy bias and shift, zero point": {"passes": [SHIFT], "quantizer": RTN, "activations": FIXED},
    "GPTQ, zero point": {"passes": [], "quantizer": {"name": "gptq"}, "activations": FIXED},
    "GPTQ, noisy bias and shift, zero point": {
        "passes": [SHIFT],
        "quantizer": {"name": "gptq"},
        "activations": FIXED,
    },
    "default recipe": {},
}


def digits() -> tuple[Tensor, Tensor]:
    """Return 1797 scans of digits: float32 [n, 1, 8, 8] in [-1, 1], int64 [n] (UCI optdigits, with scikit-learn)."""
    found = load_digits()
    order = np.random.default_rng(0).permutation(len(found.target))
    images = torch.from_numpy(found.images[order]).float()[:, None] / 8 - 1
    return images, torch.from_numpy(found.target[order]).long()


def train(images: Tensor, labels: Tensor) -> nn.Module:
    """Train a ViT of four layers, the same in every call; the global generator keeps its state."""
    from transformers import ViTConfig, ViTForImageClassification

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: nn.Module = ViTForImageClassification(ViTConfig(**CONFIG))
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
        for _ in range(EPOCHS):
            for batch in torch.randperm(len(labels)).split(BATCH):
                optimizer.zero_grad()
                cross_entropy(model(pixel_values=images[batch]).logits, labels[batch]).backward()
                optimizer.step()
    return model.eval()


@torch.no_grad()
def scores(model: nn.Module, reference: nn.Module, images: Tensor, labels: Tensor) -> tuple[float, float]:
    """Return the accuracy, and the mean KL to the float model in nats."""
    logits, expected = (m(pixel_values=images).logits for m in (model, reference))
    return float((logits.argmax(-1) == labels).float().mean()), divergence(logits, expected, labels).mean("kl")


def main() -> None:
    """Train, quantize to W6A6 and W4A4 with each recipe, and print one table."""
    images, labels = digits()
    unseen, known = slice(0, HELD_OUT), slice(HELD_OUT, None)
    model = train(images[known], labels[known])
    table = Table("scheme", "recipe", "accuracy", "KL", "with a bias", box=SIMPLE_HEAD)
    table.add_row("float", "", f"{scores(model, model, images[unseen], labels[unseen])[0]:.3f}", "", "")
    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch) / "digits.safetensors"
        save_file({"pixel_values": images[known][:128].contiguous()}, data)
        for scheme in ("W6A6", "W4A4"):
            for name, recipe in RECIPES.items():
                artifact = quantize_model(
                    model, scheme=scheme, recipe=recipe, output_dir=Path(scratch) / scheme / name, calibration=data,
                    group_size=0,
                )  # fmt: skip
                accuracy, kl = scores(artifact.load(), model, images[unseen], labels[unseen])
                kept = len(artifact.manifest["online"].get("noisy_bias", ()))
                table.add_row(scheme, name, f"{accuracy:.3f}", f"{kl:.5f}", f"{kept}" if kept else "")
    Console().print(table)


if __name__ == "__main__":
    main()
