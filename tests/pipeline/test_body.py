"""A run says what share of the parameters it quantized, and truly why the rest stays in floating point."""

from __future__ import annotations

import io

import torch
from rich.console import Console
from torch import nn

from quantize.graph.linears import NOT_ALONE
from quantize.pipeline.body import NO_LINEAR


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(512, 16), nn.Linear(16, 512)
        self.linear, self.norm, self.filter = nn.Linear(16, 16), nn.LayerNorm(16), nn.Conv1d(16, 16, 3, padding=1)
        self.factor, self.places = nn.Parameter(torch.randn(16, 16) / 4), nn.Embedding(64, 16)
        self.image = nn.Linear(8, 16)

    def forward(self, ids, image=None):
        x = self.table(ids) + self.places(torch.arange(ids.shape[1]))
        if image is not None:
            x = x + self.image(image)
        y = torch.einsum("btc,cd->btd", self.norm(x), self.factor) @ self.factor.T
        return self.head(self.linear(x) + y + self.filter(x.mT).mT)


REASONS = {
    "factor": NOT_ALONE,
    "places.weight": "`embedding` reads it, which is no linear",
    "image.weight": "a pass with `ids` alone does not reach it",
    "image.bias": "a pass with `ids` alone does not reach it",
    "norm.weight": NO_LINEAR,
}


def test_the_share_counts_parameters_of_the_body_and_reasons_are_true(small_run):
    torch.manual_seed(0)
    console = Console(file=io.StringIO(), width=1000)
    artifact = small_run(Model(), "W8A8", console=console, recipe={"passes": [], "quantizer": {"name": "rtn"}})
    coverage, body = artifact.manifest["coverage"], artifact.manifest["body"]
    assert {name: coverage[name] for name in REASONS} == REASONS
    assert body["quantized"] == 256
    size = body["parameters"]
    assert size == sum(p.numel() for p in Model().parameters()) - 2 * 512 * 16 - 512
    why = REASONS["places.weight"]
    assert body["left"][0] == {"reason": why, "parameters": 1024, "tensors": 1, "largest": "places.weight"}
    assert f"{256 / size:.1%} of the body's parameters quantized" in artifact.summary()
    shown = console.file.getvalue().splitlines()
    where = shown.index(f"warning: only {256 / size:.1%} of the body's parameters are quantized")
    assert shown[where + 1] == f"{1024 / size:.1%} of the body stays in floating point: places.weight ({why})"
    assert f"image.weight and 1 more ({REASONS['image.weight']})" in "\n".join(shown)


def test_nothing_is_said_of_a_body_that_is_quantized(artifact_one_layer):
    left = artifact_one_layer.manifest["body"]["left"]
    assert [found["reason"] for found in left] == [NO_LINEAR]
    assert "99.6% of the body's parameters quantized" in artifact_one_layer.summary()
