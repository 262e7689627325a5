"""A whole model is tuned towards the float model; before a step it computes what the artifact computes."""

import torch
from torch.nn.functional import kl_div

from benchmarks.end_to_end import tunable, tune
from quantize.eval.loading import load_any

IDS = torch.arange(3, 67)[None]


def test_tuning_lowers_the_divergence(artifact_w4a4, stories):
    reference, expected = load_any(stories), artifact_w4a4.load()(IDS).logits

    def divergence(model):
        p, q = (each(IDS).logits.detach().log_softmax(-1) for each in (reference, model))
        return float(kl_div(q, p, log_target=True, reduction="sum"))

    for name in ("scales", "integers", "choices"):
        model, parameters = tunable(artifact_w4a4.directory)
        assert torch.allclose(model(IDS).logits, expected, atol=1e-4)
        before = divergence(model)
        tune(model, reference, {name: parameters[name]}, [IDS] * (100 if name == "choices" else 20))
        assert divergence(model) < 0.9 * before
