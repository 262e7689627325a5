"""A loaded model is pickled, copied, and compiled on a CPU in one graph."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch

from quantize.artifact.load import load

pytestmark = pytest.mark.slow
IDS = torch.tensor([[1, 403, 407, 261]])
RTN = {"quantizer": {"name": "rtn"}}
KINDS = {
    "NVFP4": {"group_size": None, "ignore": ["down_proj"]},
    "W4A8": {"recipe": {"passes": [{"name": "rotate"}]} | RTN},
    "W4A4": {"recipe": {"kv_cache": {"num_bits": 8}} | RTN},
    "W4A16": {"recipe": RTN},
    "MXFP4": {"group_size": None, "ignore": ["down_proj"], "recipe": RTN},
    "W6A6": {"recipe": {"passes": []} | RTN},
    "W8A8": {"recipe": {"passes": [{"name": "smoothquant"}]} | RTN},
}


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.fixture(scope="module")
def artifacts(one_layer, tmp_path_factory, stories_calibration):
    from quantize.pipeline.quantize import quantize_model

    directory, made = tmp_path_factory.mktemp("copies"), {}

    def find(scheme):
        if scheme not in made:
            settings = {"group_size": 0, "nsamples": 2, "seqlen": 16} | KINDS[scheme]
            out = directory / scheme
            made[scheme] = quantize_model(
                one_layer, output_dir=out, scheme=scheme, calibration=stories_calibration, **settings
            )
        return made[scheme].directory

    return find


@torch.no_grad()
def logits(model):
    return model(IDS, use_cache=False).logits


@pytest.mark.parametrize("scheme", KINDS)
@pytest.mark.parametrize("used", [False, True])
def test_copies_compute_the_same(scheme, used, artifacts):
    model = load(artifacts(scheme))
    expected = logits(copy.deepcopy(model))
    if used:  # weights are laid out, which copies do not take along
        assert torch.equal(logits(model), expected)
    for make in (copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), saved):
        copied = make(model)
        assert torch.equal(logits(copied), expected)
        assert copied.state_dict().keys() == model.state_dict().keys()
        assert all(copied.state_dict()[name].dtype == x.dtype for name, x in model.state_dict().items())


@pytest.mark.parametrize("scheme", ["NVFP4", "W4A8", "W4A4"])
@pytest.mark.parametrize(("engine", "used"), [("fake_quant", True), ("fake_quant", False), ("reference", False)])
def test_compilers_see_one_graph(scheme, engine, used, artifacts):
    model = load(artifacts(scheme), engine=engine)
    expected = logits(copy.deepcopy(model))
    if used:
        logits(model)
    torch._dynamo.reset()
    found = logits(torch.compile(model, fullgraph=True, backend="eager"))
    assert torch.allclose(found, expected, rtol=0, atol=1e-4)
    assert used is False or torch.equal(found, expected)
