"""A pass that changes the function is stopped, and the message says which, where and by how much."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import quantize
from quantize.checkpoint.opening import open_checkpoint
from quantize.errors import QuantizeError
from quantize.passes import PASSES
from quantize.pipeline.sequential import SequentialPipeline
from quantize.transforms import equivalence
from quantize.transforms.fold import Diagonal, Rotation, fold
from quantize.transforms.online import Dual

pytestmark = pytest.mark.slow


class WrongDiagonal(Diagonal):
    """A reader that divides by the square root only: half a fold."""

    def apply_inverse_transpose(self, columns):
        return columns / self.d.to(columns).sqrt()


class WrongRotation(Rotation):
    """Readers that forget the signs."""

    def apply_inverse_transpose(self, columns):
        return Rotation(torch.ones_like(self.signs), self.size).apply(columns)


def run(model, calibration, output, passes):
    return quantize.quantize_model(
        model, scheme="W4A8", output_dir=output, calibration=calibration, group_size=0, nsamples=2, seqlen=32,
        recipe={"passes": passes, "quantizer": {"name": "rtn"}},
    )  # fmt: skip


def test_a_wrong_fold_is_stopped(stories, stories_calibration, tmp_path, monkeypatch):
    monkeypatch.setattr("quantize.passes.smoothquant.Diagonal", WrongDiagonal)
    with pytest.raises(QuantizeError) as caught:
        run(stories, stories_calibration, tmp_path / "out", [{"name": "smoothquant"}])
    message = str(caught.value)
    assert "`smoothquant` changes the function of model.layers.0" in message
    assert "at basis " in message
    assert "layernorm.weight → " in message
    assert "(allowed 1e-09)" in message
    assert not (tmp_path / "out").exists()


def test_a_wrong_rotation_names_the_basis_at_fault(stories, stories_calibration, tmp_path, monkeypatch):
    monkeypatch.setattr("quantize.passes.rotate.Rotation", WrongRotation)
    passes = [{"name": "fold_norms"}, {"name": "rotate", "heads": False}]
    with pytest.raises(QuantizeError, match=r"`rotate`.*basis 0 \(model\.embed_tokens\.weight → "):
        run(stories, stories_calibration, tmp_path / "out", passes)


def test_folds_that_need_no_data_are_checked_before_any_block_is_quantized(
    stories, stories_calibration, tmp_path, monkeypatch
):
    """A rotation that is wrong in the last block only costs no block of work, though GPTQ would come first."""
    blocks = []
    monkeypatch.setattr(
        SequentialPipeline, "process", lambda self, segment, arriving, file: blocks.append(segment.name)
    )
    monkeypatch.setattr(
        "quantize.pipeline.steps.transform.fold",
        lambda basis, transform, weights: {
            name: W * 1.01 if name == "model.layers.4.mlp.down_proj.weight" else W
            for name, W in fold(basis, transform, weights).items()
        },
    )
    with pytest.raises(QuantizeError, match=r"`rotate` changes the function of model\.layers\.4: "):
        quantize.quantize_model(
            stories, scheme="W4A8", output_dir=tmp_path / "out", calibration=stories_calibration, group_size=0,
            nsamples=2, seqlen=32,
        )  # fmt: skip
    assert not blocks
    assert not list(tmp_path.iterdir())


def test_float32_that_cancels_is_compared_in_float64(stories, stories_calibration, tmp_path, monkeypatch):
    """A fold that is right passes although float32 is over the line; a wrong one does not (the tests above)."""
    monkeypatch.setattr(equivalence, "TOLERANCE", 1e-7)  # less than float32's own rounding here
    passes = [{"name": "fold_norms"}, {"name": "rotate"}]
    found = run(stories, stories_calibration, tmp_path / "out", passes).manifest["gate"]["passes"]["rotate"]
    assert all(found[f"model.layers.{i}"] < 1e-11 for i in range(5))


def test_a_dual_rotation_in_front_of_a_linear_is_exact_in_float64():
    first, second = (torch.linalg.qr(torch.randn(2, 4, 4, dtype=torch.float64))[0] for _ in range(2))
    online = Dual(first, torch.randperm(8), second)
    x, W = torch.randn(5, 8, dtype=torch.float64), torch.randn(3, 8, dtype=torch.float64)
    assert float((online(x) @ online.weight(W).T - x @ W.T).abs().max()) < 1e-12


def test_a_model_with_gains_of_zero_is_quantized(one_layer, stories_calibration, tmp_path):
    """Gemma 3 has such gains; the channels stay dead, whatever the rotation puts there."""
    model = tmp_path / "model"
    shutil.copytree(one_layer, model)
    (file,) = model.glob("*.safetensors")
    tensors = load_file(file)
    tensors["model.layers.0.post_attention_layernorm.weight"][3] = 0
    tensors["model.norm.weight"][[0, 5]] = 0
    save_file(tensors, file, {"format": "pt"})
    found = run(model, stories_calibration, tmp_path / "out", [{"name": "fold_norms"}, {"name": "rotate"}])
    assert all(
        difference < 1e-5 for blocks in found.manifest["gate"]["passes"].values() for difference in blocks.values()
    )
    ids = torch.arange(3, 35)[None]
    with torch.no_grad():
        expected, logits = open_checkpoint(model).load()(ids).logits, found.load()(ids).logits
    assert float((logits - expected).norm() / expected.norm()) < 0.3


def test_an_illegal_site_is_stopped(stories, stories_calibration, tmp_path, monkeypatch):
    """The gate does not trust the analysis either: rotating a gated basis is caught."""
    monkeypatch.setattr(
        PASSES["rotate"], "sites", lambda _, bases: tuple(b for b in bases if b.dim == 172 and b.readers)
    )
    passes = [{"name": "rotate", "online_hadamard": False}]
    with pytest.raises(
        QuantizeError, match=r"`rotate` changes the function of model\.layers\.0: at basis \d+ \(.*up_proj"
    ):
        run(stories, stories_calibration, tmp_path / "out", passes)


def test_a_non_finite_difference_is_infinite():
    assert equivalence.relative(torch.tensor([float("nan")]), torch.ones(1)) == float("inf")
    assert equivalence.relative(torch.tensor([1.5]), torch.tensor([1.0])) == 0.5


def test_the_manifest_carries_the_differences_of_every_block(artifact_w4a4):
    passes = artifact_w4a4.manifest["gate"]["passes"]
    assert set(passes) == {"rescale", "fold_norms", "learned_rotation"}
    assert len(passes["learned_rotation"]) == 7
    assert all(0 <= difference < 1e-5 for blocks in passes.values() for difference in blocks.values())
