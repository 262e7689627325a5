"""The weights of the block at work are held, and those of the next one, which arrive meanwhile."""

import weakref

import pytest

import quantize
from quantize.checkpoint import checkpoint, tensor_files


@pytest.mark.slow
def test_no_more_than_two_blocks_are_in_memory(stories, stories_calibration, tmp_path, monkeypatch):
    alive, most, read = [], 0, tensor_files.read_tensor

    def watched(path, name):
        nonlocal most
        tensor = read(path, name)
        alive.append((weakref.ref(tensor), tensor.nbytes))
        most = max(most, sum(size for ref, size in alive if ref() is not None))
        return tensor

    monkeypatch.setattr(checkpoint, "read_tensor", watched)
    monkeypatch.setattr(tensor_files, "read_tensor", watched)
    quantize.quantize_model(
        stories,
        scheme="W4A4",
        output_dir=tmp_path / "out",
        calibration=stories_calibration,
        group_size=0,
        nsamples=4,
        seqlen=32,
    )
    total = sum(path.stat().st_size for path in stories.glob("*.safetensors"))
    assert 0.1 * total < most < 0.55 * total  # a fifth of it is one of the five blocks
