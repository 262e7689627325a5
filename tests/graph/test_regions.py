"""Parts that run without gradients or with autocast off are parts of the graph like all others."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from quantize import load
from quantize.checkpoint.opening import open_checkpoint
from quantize.graph.fallback.program import make_program

REGIONS = {
    "no_grad": torch.no_grad,
    "enable_grad": torch.enable_grad,
    "autocast off": lambda: torch.autocast("cpu", enabled=False),
    "autocast on": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
}
IDS = torch.arange(64).reshape(4, 16)


class Model(nn.Module):
    """A table and two linears in a region, one of them in a region within it, and a buffer that is read there."""

    def __init__(self, name):
        super().__init__()
        self.table, self.a, self.b, self.c = nn.Embedding(64, 16), *(nn.Linear(16, 16) for _ in range(3))
        self.register_buffer("shift", torch.randn(16, generator=torch.Generator().manual_seed(0)))
        self.head, self.region = nn.Linear(16, 64), REGIONS[name]

    def forward(self, ids):
        with self.region():
            x = self.a(self.table(ids)) + self.shift
            with torch.no_grad():
                y = self.b(x)
        return self.head(self.c(x + y).float())


@pytest.mark.parametrize("name", REGIONS)
def test_what_stands_in_a_region_is_found_and_quantized(small_run, name):
    torch.manual_seed(0)
    model = Model(name)
    checkpoint = open_checkpoint(model)
    program = make_program(checkpoint, checkpoint.skeleton())
    assert [linear.path for linear in program.all_linears] == ["a", "b", "c", "head"]
    assert program.vocabulary == 64
    assert program.export_error == ("it turns autocast on" if name == "autocast on" else "")
    artifact = small_run(model, "W8A8", calibration=IDS, nsamples=4, seqlen=16)
    assert artifact.manifest["body"]["quantized"] == 3 * 16 * 16
    with torch.no_grad():
        difference = (load(artifact.directory, skeleton=Model(name))(IDS) - model(IDS)).norm() / model(IDS).norm()
    assert 0 < float(difference) < 0.05
