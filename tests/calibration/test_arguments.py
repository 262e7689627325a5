"""Any module is calibrated on a tensor for each argument of its `forward`, from a file as from memory."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional

from quantize import load
from quantize.artifact.verify import verify_artifact
from quantize.calibration.arguments import look_into, match_inputs
from quantize.calibration.sources import read_source
from quantize.errors import QuantizeError, UsageError
from quantize.nn.quantized_linear import QuantizedLinear

DIM, ROWS = 32, 8
SMOOTH = {"passes": [{"name": "smoothquant"}], "quantizer": {"name": "rtn"}}
RTN = {"passes": [], "quantizer": {"name": "rtn"}}


class Block(nn.Module):
    """A block of a diffusion transformer, whose norm is scaled and shifted by a condition."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(DIM, elementwise_affine=False)
        self.up, self.down, self.condition = nn.Linear(DIM, 64), nn.Linear(64, DIM), nn.Linear(DIM, 2 * DIM)

    def forward(self, x, c):
        scale, shift = self.condition(functional.silu(c)).unsqueeze(1).chunk(2, -1)
        return x + self.down(functional.gelu(self.up(self.norm(x) * (1 + scale) + shift)))


class LatentDiffusion(nn.Module):
    """Takes latents, a time step and a label."""

    def __init__(self):
        super().__init__()
        self.patches, self.time, self.kinds = nn.Linear(4, DIM), nn.Linear(1, DIM), nn.Embedding(11, DIM)
        self.blocks, self.out = nn.ModuleList([Block(), Block()]), nn.Linear(DIM, 4)

    def forward(self, latents, t, labels):
        x, c = self.patches(latents), self.time(t[:, None].float() / 1000) + self.kinds(labels)
        for block in self.blocks:
            x = block(x, c)
        return self.out(x)


class LanguageDiffusion(nn.Module):
    """Takes token ids and a time step, which it looks up in a table smaller than its vocabulary."""

    def __init__(self):
        super().__init__()
        self.words, self.times = nn.Embedding(128, DIM), nn.Embedding(20, DIM)
        self.blocks, self.head = nn.ModuleList([Block()]), nn.Linear(DIM, 128)

    def forward(self, ids, t, mask=None):
        x = self.words(ids)
        for block in self.blocks:
            x = block(x, self.times(t))
        return self.head(x if mask is None else x * mask.unsqueeze(-1))


class DependsOnData(LatentDiffusion):
    """Cannot be exported."""

    def forward(self, latents, t, labels):
        return super().forward(latents, t, labels) * (1 if int(t.sum()) >= 0 else -1)


def latents(rows=ROWS):
    rng = torch.Generator().manual_seed(0)
    t, labels = torch.randint(0, 1000, (rows,), generator=rng), torch.randint(0, 11, (rows,), generator=rng)
    return {"latents": torch.randn(rows, 6, 4, generator=rng), "t": t, "labels": labels}


def words(rows=ROWS, length=12):
    rng = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 128, (rows, length), generator=rng)
    return {"ids": ids, "t": torch.randint(0, 20, (rows,), generator=rng)}


def build(kind):
    torch.manual_seed(0)
    return kind().eval()


@pytest.mark.parametrize(
    ("kind", "data"), [(LatentDiffusion, latents), (LanguageDiffusion, words), (DependsOnData, latents)]
)
def test_a_module_runs_on_tensors_for_its_arguments(small_run, kind, data, tmp_path):
    model, given = build(kind), data()
    save_file(given, tmp_path / "rows.safetensors")
    artifact = small_run(model, "W4A8", calibration=tmp_path / "rows.safetensors", nsamples=ROWS)
    loaded = artifact.load()
    assert type(loaded.blocks[0].up) is QuantizedLinear
    with torch.no_grad():
        found, expected = loaded(**given), model(**given)
    assert 0 < float((found - expected).norm() / expected.norm()) < 0.1
    assert artifact.manifest["calibration"]["rows"] in (ROWS, ROWS - 1)
    assert artifact.manifest["export"]["exported"] is (kind is not DependsOnData)


@pytest.mark.slow
def test_a_file_memory_and_batches_are_the_same_data(small_run, tmp_path):
    model, given, files = build(LatentDiffusion), latents(), []
    save_file(given, tmp_path / "rows.safetensors")
    torch.save(given, tmp_path / "rows.pt")
    halves = [{name: x[part] for name, x in given.items()} for part in (slice(0, 4), slice(4, 8))]
    data = (tmp_path / "rows.safetensors", tmp_path / "rows.pt", given, halves, iter(halves))
    for number, each in enumerate(data):
        artifact = small_run(model, "W8A8", output=f"out{number}", calibration=each, nsamples=ROWS, recipe=RTN)
        files.append(artifact.manifest["files"])
    assert all(each == files[0] for each in files)


def test_integers_are_bound_by_the_table_that_each_is_looked_up_in(small_run):
    model, given = build(LanguageDiffusion), words()
    small_run(model, "W8A8", calibration=given | {"ids": given["ids"] * 0 + 127}, recipe=RTN)
    for name, bound in (("ids", 128), ("t", 20)):
        wrong = given | {name: given[name] * 0 + bound}
        with pytest.raises(UsageError, match=f"holds {bound} in {name}; the model knows 0 to {bound - 1}"):
            small_run(model, "W8A8", output="wrong", calibration=wrong, recipe=RTN)


def test_samples_may_have_unlike_lengths_and_are_never_cut(small_run):
    model = build(LanguageDiffusion)
    rows = [words(2, length) for length in (40, 60)]  # a run cuts text to 32 tokens
    artifact = small_run(model, "W8A8", calibration=rows, nsamples=4, recipe=SMOOTH)
    assert artifact.manifest["calibration"]["tokens"] in (2 * 40 + 60, 40 + 2 * 60)


def test_a_floating_point_input_alone(small_run):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 8)).eval(), torch.randn(ROWS, 5, 16)
    for number, data in enumerate((x, {"input": x}, [x[:4], x[4:]])):
        artifact = small_run(model, "W4A8", output=f"out{number}", calibration=data)
        with torch.no_grad():
            assert float((artifact.load()(x) - model(x)).norm() / model(x).norm()) < 0.2


def test_what_forward_does_not_take_is_one_sentence(small_run, tmp_path):
    model, given = build(LatentDiffusion), latents()
    takes = "the model takes latents, t and labels; give a --calibration FILE.safetensors with a tensor for each"
    (tmp_path / "a.txt").write_text("a text")
    for data in (None, tmp_path / "a.txt", ["a text"], [[1, 2, 3]]):
        with pytest.raises(UsageError, match=takes):
            small_run(model, calibration=data)
    forward = "the model's forward takes latents, t, labels: give a tensor for each, whose first axis is the samples"
    short = {name: x for name, x in given.items() if name != "t"}
    for data, words_ in (
        (short, f"holds no t; {forward}"),
        (given | {"time": given["t"]}, f"holds a tensor time; {forward}"),
        (given | {"t": given["t"][:3]}, "holds 8 of latents and 3 of t and 8 of labels; the first axis of each"),
        (given | {"t": torch.tensor(3)}, "0 of t"),
        ([given, given | {"t": given["t"].float()}], "holds samples of unlike tensors; give all of them the same"),
    ):
        with pytest.raises(UsageError, match=words_):
            small_run(model, calibration=data)
    given["latents"][3, 1, 2] = float("nan")
    with pytest.raises(QuantizeError, match="holds values of latents that are not finite"):
        small_run(model, calibration=given, nsamples=ROWS)


@pytest.mark.slow
def test_a_mask_of_ones_and_labels_are_left_out(one_layer, small_run, tmp_path):
    ids = torch.randint(3, 500, (ROWS, 16), generator=torch.Generator().manual_seed(0))
    plain = small_run(one_layer, "W8A8", calibration={"input_ids": ids}, recipe=RTN)
    mask = torch.ones_like(ids)
    save_file({"input_ids": ids, "attention_mask": mask, "labels": ids.clone()}, tmp_path / "rows.safetensors")
    found = small_run(one_layer, "W8A8", output="b", calibration=tmp_path / "rows.safetensors", recipe=RTN)
    assert found.manifest["files"] == plain.manifest["files"]


def test_a_known_argument_is_read_as_before():
    model = build(LanguageDiffusion)
    model.forward = lambda ids, mask=None: model.head(model.words(ids))
    inputs, rows = match_inputs(model, look_into({"ids": words()["ids"]}), 4)
    assert rows is None
    assert len(read_source({"ids": words()["ids"]}, inputs, 8, 4, None, 128).rows) == 4
    inputs, rows = match_inputs(model, look_into({"ids": words()["ids"], "mask": torch.ones(ROWS, 12).bool()}), 4)
    assert [(name, x.example.shape, x.dynamic) for name, x in inputs.items()] == [
        ("ids", (2, 12), (0,)),
        ("mask", (2, 12), (0,)),
    ]
    assert [row["mask"].dtype for row in rows] == [torch.bool] * 4


def test_an_artifact_of_several_arguments_is_loaded_and_verified(small_run):
    model = build(LatentDiffusion)
    artifact = small_run(model, "W8A8", calibration=latents(), recipe=RTN)
    loaded = load(artifact.directory, skeleton=build(LatentDiffusion))
    given = latents(2)
    with torch.no_grad():
        assert torch.equal(loaded(**given), artifact.load()(**given))
    with pytest.raises(UsageError, match="transformers does not know"):
        verify_artifact(artifact.directory)
