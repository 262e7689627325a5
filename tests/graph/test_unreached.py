"""What a pass with other arguments could bring into the residual pins it; models of images and text are quantized."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

from quantize.graph.allowed_transforms import AllowedTransforms
from quantize.graph.analysis import admissible_bases
from quantize.graph.export import export_program

TEXT = {
    "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "intermediate_size": 48, "vocab_size": 512, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
VISION = {"num_hidden_layers": 1, "num_attention_heads": 4, "hidden_size": 32, "intermediate_size": 48}
IMAGE, PATCHES = 510, 16
RTN = {"passes": [{"name": "fold_norms"}, {"name": "rotate"}], "quantizer": {"name": "rtn"}}


class Layer(nn.Module):
    def __init__(self, sees=False):
        super().__init__()
        self.norm, self.up, self.down = nn.RMSNorm(16), nn.Linear(16, 24), nn.Linear(24, 16)
        if sees:
            self.look = nn.Linear(24, 24)

    def forward(self, x, features=None):
        hidden = self.up(self.norm(x))
        if features is not None and hasattr(self, "look"):
            hidden = hidden + self.look(hidden)
        return x + self.down(hidden)


class Sees(nn.Module):
    """Takes token ids, and features that come in where no pass with ids alone shows them."""

    def __init__(self, features=True):
        super().__init__()
        self.table, self.head = nn.Embedding(64, 16), nn.Linear(16, 64, bias=False)
        self.layers = nn.ModuleList([Layer(), Layer(sees=features)])
        if features:
            self.projector = nn.Linear(8, 16)

    def forward(self, ids, features=None):
        x = self.table(ids)
        if features is not None:
            x = torch.cat([self.projector(features), x], dim=1)
        for layer in self.layers:
            x = layer(x, features)
        return self.head(x)


class SeesNothing(Sees):
    def forward(self, ids):
        return super().forward(ids)


def allowed_at(module, name):
    return next(
        b.allowed for b in admissible_bases(export_program(module)) if any(e.parameter == name for e in b.writers)
    )


def test_a_residual_that_features_may_enter_is_pinned_and_so_is_a_block_that_may_do_more():
    model = Sees()
    assert export_program(model).unreached == {
        f"{path}.{leaf}" for path in ("layers.1.look", "projector") for leaf in ("weight", "bias")
    }
    assert allowed_at(Sees(), "table.weight") == AllowedTransforms.NONE
    assert allowed_at(Sees(), "layers.0.up.weight") == AllowedTransforms.LINEAR
    assert allowed_at(Sees(), "layers.1.up.weight") == AllowedTransforms.NONE


def test_nothing_is_pinned_where_all_is_reached_or_nothing_more_can_be_given():
    assert allowed_at(Sees(features=False), "table.weight") == AllowedTransforms.ORTHOGONAL
    assert allowed_at(SeesNothing(), "table.weight") == AllowedTransforms.ORTHOGONAL


def seeing(cls, config, **more):
    """Return a random model of images and text, of one layer each."""
    torch.manual_seed(0)
    model = getattr(transformers, cls)(getattr(transformers, config)(**more)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(4) if parameter.dim() > 1 else parameter.add_(0.2 * torch.randn(parameter.shape))
            assert parameter.isfinite().all(), name
    return model


def llava():
    vision = VISION | {"model_type": "clip_vision_model", "image_size": 32, "patch_size": 8}
    text = TEXT | {"model_type": "llama"}
    return seeing(
        "LlavaForConditionalGeneration", "LlavaConfig", text_config=text, vision_config=vision, image_token_index=IMAGE
    )


def idefics():
    vision, text = VISION | {"image_size": 64, "patch_size": 8}, TEXT | {"model_type": "llama"}
    return seeing(
        "Idefics3ForConditionalGeneration", "Idefics3Config",
        text_config=text, vision_config=vision, image_token_id=IMAGE, scale_factor=2,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("build", "shape"), [(llava, (1, 3, 32, 32)), (idefics, (1, 1, 3, 64, 64))])
def test_logits_with_an_image_are_as_near_as_without(small_run, tmp_path, build, shape):
    model = build()
    model.save_pretrained(tmp_path / "model")
    artifact = small_run(tmp_path / "model", "W8A8", recipe=RTN)
    quantized = artifact.load()
    words = torch.randint(3, 500, (1, 16), generator=torch.Generator().manual_seed(0))
    ids = torch.cat([words[:, :4], torch.full((1, PATCHES), IMAGE), words[:, 4:]], dim=1)
    image = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    for given in ({"input_ids": words}, {"input_ids": ids, "pixel_values": image}):
        with torch.no_grad():
            expected, found = model(**given).logits, quantized(**given).logits
        assert float((found - expected).norm() / expected.norm()) < 0.05
    done = {name for name, how in artifact.manifest["coverage"].items() if how == "quantized"}
    assert "model.text_model.layers.0.mlp.up_proj.weight" in done or (
        "model.language_model.layers.0.mlp.up_proj.weight" in done
    )
    assert not [name for name in done if "vision" in name]
