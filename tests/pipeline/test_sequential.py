"""Blocks one after the other: what runs is what is stored, and looking ahead changes nothing."""

import json
import shutil

import pytest
import torch
from torch import nn

import quantize
from quantize.calibration.runner import SequentialRunner
from quantize.calibration.statistics import Absmax
from quantize.checkpoint.opening import open_checkpoint
from quantize.graph.export import export_program
from quantize.graph.interpreter import Overrides


@pytest.mark.slow
def test_a_bfloat16_model_runs_with_what_is_stored(books, stories_calibration, tmp_path):
    """Rotated embeddings are rounded when they are written; later blocks must see them rounded."""
    model = tmp_path / "model"
    shutil.copytree(books, model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    artifact = quantize.quantize_model(
        model, scheme="W4A8", output_dir=tmp_path / "out", calibration=stories_calibration, nsamples=2, seqlen=16
    )
    assert artifact.manifest["parity"]["reloaded"] < 1e-6
    assert {p.dtype for p in artifact.load().parameters()} == {torch.float32}


@pytest.mark.slow
def test_looking_ahead_does_not_advance(stories):
    checkpoint = open_checkpoint(stories)
    program = export_program(checkpoint.skeleton())
    runner = SequentialRunner(program, [torch.arange(12)[None]])
    head, block = program.segments[:2]
    state = Overrides({name: checkpoint.tensor(name) for name in (*head.parameters, *block.parameters)})
    runner.run(head.nodes, state)
    before = dict(runner.values[0])
    linears = program.linears(block)
    seen = runner.collect_without_advancing(
        block, state, linears, Absmax, {linear: nn.Identity() for linear in linears}
    )
    assert runner.values[0] == before
    assert {path: statistic.value.shape for path, statistic in seen.items()} == {
        linear.weight: (state.weights[linear.weight].shape[1],) for linear in program.linears(block)
    }
