"""Calibration activations in files change nothing; `make bench-scale` on a tiny model."""

import json
import time

import pytest
import torch
from click.testing import CliRunner

from benchmarks.machine import processor
from benchmarks.scale import bench, bound
from benchmarks.scale.bound import verdict
from benchmarks.scale.model import write_model, write_tokens
from quantize.calibration import runner, spill
from quantize.calibration.spill import ActivationCache, SpilledTensor
from quantize.errors import QuantizeError


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [{"quantizer": {"name": "gptaq"}}, {"tune": {"steps": 2}}], ids=["gptaq", "tune"])
def test_activations_in_files_give_the_same_bytes(recipe, one_layer, small_run, tree, monkeypatch):
    in_memory = small_run(one_layer, "W4A16", "memory", recipe=recipe, nsamples=5, seqlen=512)
    filed = []
    monkeypatch.setattr(spill, "IN_MEMORY", 100_000)
    monkeypatch.setattr(
        SpilledTensor, "read", lambda self, read=SpilledTensor.read: filed.append(self.nbytes) or read(self)
    )
    in_files = small_run(one_layer, "W4A16", "files", recipe=recipe, nsamples=5, seqlen=512)
    assert sum(filed) > 1_000_000
    monkeypatch.undo()
    monkeypatch.setattr(
        runner, "SMALL_ACTIVATION_BYTES", 0
    )  # all weights of a stretch unpacked at once, as for many activations
    at_once = small_run(one_layer, "W4A16", "whole", recipe=recipe, nsamples=5, seqlen=512)
    assert tree(in_memory) == tree(in_files) == tree(at_once)


def test_what_finds_no_room_comes_back_as_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr(spill, "IN_MEMORY", 50_000)
    values = [{"x": torch.randn(100, 100) * i, "ids": torch.arange(5), "switch": False} for i in range(3)]
    batches = ActivationCache(values, tmp_path)
    assert [isinstance(held["x"], SpilledTensor) for held in batches.held] == [False, True, True]
    for _ in range(2):
        for number, (found, expected) in enumerate(zip(batches, values, strict=True)):
            assert torch.equal(found["x"], expected["x"]) and torch.equal(found["ids"], expected["ids"])
            found["x"] += 0  # the caller's own copy
            batches[number] = found
    assert not list(tmp_path.iterdir())


def test_a_directory_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(spill, "IN_MEMORY", 0)
    with pytest.raises(QuantizeError, match="cannot be written beside the output"):
        ActivationCache([{"x": torch.zeros(100, 100)}], tmp_path / "missing")


def test_a_model_is_the_same_each_time(tmp_path, tree):
    assert write_model(tmp_path / "a", "tiny", 2) == write_model(tmp_path / "b", "tiny", 2)
    assert tree(tmp_path / "a") == tree(tmp_path / "b")


@pytest.mark.slow
def test_bench_scale_on_a_tiny_model(tmp_path):
    """Each run is a process of its own; the layers' memory and time are in the table, and nothing else is left."""
    arguments = ["--size", "tiny", "--layers", "1", "--method", "gptq", "--samples", "2", "--seqlen", "32"]
    done = CliRunner().invoke(bench.main, [*arguments, "--output", str(tmp_path)], catch_exceptions=False)
    assert done.exit_code == 0
    name = f"scale-{processor().kind}"
    (row,) = json.loads((tmp_path / f"{name}.json").read_text())
    assert row["peak_mb"] > row["interpreter_mb"] > 100
    assert {"forward", "Gram", "solve", "scales", "error feedback", "columns", "sweeps"} <= row["phases"].keys()
    block, head, down, attention = 2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 256, 512 * 64, 64 * 256, 4 * 32 * 32 * 64
    probes, calibration = 2 * 2 * 32 * (block + head), 2 * 32 * (block - down)  # tokens that run, times weights
    assert row["phases"]["forward"]["flops"] == 2 * (probes + calibration) + 6 * attention
    assert "| tiny | 1 | gptq |" in (tmp_path / f"{name}.md").read_text()
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"{name}.json", f"{name}.md"]


def test_what_gptq_takes_at_least_is_told_beside_what_it_takes():
    bound = {"forward pass": 2.0, "Gram matrices": 3.0}
    ours = {"method": "gptq-plain", "layers": 2, "seconds": 12.0, "peak_mb": 300.0, "bound": bound}
    rounds, peer = {"method": "rtn", "layers": 2, "seconds": 4.0}, {"method": "peer", "layers": 2, "seconds": 40.0}
    peer["peak_mb"] = 1000.0
    text = verdict([{**peer, "layers": 1, "seconds": 1.0}, rounds, ours, peer], "peer")
    assert "30% of the time and 30% of the memory" in text
    assert "forward pass 2, Gram matrices 3" in text and "9, or 22% of the peer's time" in text
    assert verdict([rounds, ours], "peer") == ""


def test_steps_of_the_bound_are_those_of_a_layer(tmp_path, capsys):
    """Of a model of one layer nothing is left of the forward pass, which leaves one out."""
    write_model(tmp_path / "model", "tiny", 1)
    write_tokens(tmp_path / "tokens.jsonl", "tiny", 2, 32)
    bound.main(str(tmp_path / "model"), str(tmp_path / "tokens.jsonl"))
    found = json.loads(capsys.readouterr().out)
    assert found.pop("forward pass") == 0 and len(found) == 4 and min(found.values()) > 0


def test_of_several_libraries_the_fastest_counts_and_half_of_what_computes_twice_as_much():
    def slow() -> None:
        time.sleep(0.02)

    assert bound.fastest(slow, halves=slow) == pytest.approx(0.01, rel=0.3)
    assert bound.fastest(slow, lambda: None) < 0.001
