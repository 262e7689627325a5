"""Models of images and text are quantized on pairs: the language model by default, the vision tower on request."""

from __future__ import annotations

import functools

import pytest
import torch
from transformers import Gemma3Config, Gemma3ForConditionalGeneration, LlavaConfig, LlavaForConditionalGeneration

from quantize import load
from quantize.artifact.verify import verify_artifact
from quantize.checkpoint.opening import open_checkpoint
from quantize.errors import QuantizeError
from quantize.graph.allowed_transforms import AllowedTransforms
from quantize.graph.analysis import admissible_bases
from quantize.graph.export import export_program
from quantize.graph.inputs import inputs_like
from quantize.graph.shapes import ShapeInfo, walk
from quantize.nn.quantized_linear import QuantizedLinear

IMAGE, TOKENS = 60, 4  # the id of an image's place, and how many an image takes
ROWS = 24
SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
TEXT = SIZES | {"vocab_size": 64, "num_key_value_heads": 2, "max_position_embeddings": 64, "head_dim": 16}
VISION = SIZES | {"image_size": 16, "patch_size": 8}
RTN = {"passes": [], "quantizer": {"name": "rtn"}}


def llava(**config):
    torch.manual_seed(0)
    vision = VISION | {"num_hidden_layers": 2, "model_type": "clip_vision_model"}
    text = TEXT | {"model_type": "llama"} | config
    return LlavaForConditionalGeneration(
        LlavaConfig(text_config=text, vision_config=vision, image_token_index=IMAGE)
    ).eval()


def pairs(rows=ROWS):
    """Return rows of an image and a text around it."""
    rng = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 60, (rows, 32), generator=rng)
    ids[:, 2 : 2 + TOKENS] = IMAGE
    return {"input_ids": ids, "pixel_values": torch.randn(rows, 3, 16, 16, generator=rng)}


def spread_channels(model):
    """Plant massive channels of the residual stream into a model, so that a rotation gains much."""
    with torch.no_grad():
        model.model.language_model.embed_tokens.weight[:, 5] *= 20
        model.model.multi_modal_projector.linear_2.weight[5] *= 20
    return model


def program_of(model):
    given = pairs(2)
    skeleton = open_checkpoint(model).skeleton()
    return export_program(skeleton, inputs_like(skeleton, [{name: x[0] for name, x in given.items()}]))


@pytest.fixture(scope="module")
def program():
    return program_of(llava())


def test_the_residual_is_rotated_in_the_table_and_in_what_writes_image_features(program):
    bases = admissible_bases(program)
    residual = next(b for b in bases if any("embed_tokens" in e.parameter for e in b.writers))
    assert AllowedTransforms.ORTHOGONAL in residual.allowed
    assert "model.multi_modal_projector.linear_2.weight" in {edge.parameter for edge in residual.writers}


def test_what_a_dry_run_reports_counts_sizes_that_data_decide_on(program):
    sizes = ShapeInfo(program, {name: x.shape for name, x in pairs(1).items()})
    assert max(walk(sizes).peaks.values()) > 0


def test_an_image_alone_reaches_the_tower(program):
    assert program.batch == 1  # `forward` takes the images of a batch apart
    assert {path.split(".")[1] for path in program.towers} == {"vision_tower", "multi_modal_projector"}
    assert len(program.towers) == 12 + 2


@pytest.mark.slow
def test_logits_with_and_without_an_image_are_nearer_than_by_plain_rounding(small_run):
    model, given, distances = spread_channels(llava()), pairs(), {}
    text = torch.randint(3, 60, (8, 32), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for name, recipe in (("plain", RTN), ("default", None)):
            artifact = small_run(model, "W4A8", output=name, recipe=recipe, calibration=given, nsamples=ROWS)
            loaded = load(artifact.directory)
            for kind, inputs in (("image", {k: x[:8] for k, x in given.items()}), ("text", {"input_ids": text})):
                found, expected = loaded(**inputs).logits, model(**inputs).logits
                distances[name, kind] = float((found - expected).norm() / expected.norm())
    assert verify_artifact(artifact.directory)["difference"] < 1e-5
    assert all(distances["default", kind] < distances["plain", kind] for kind in ("image", "text")), distances
    towers = [path for path, m in loaded.named_modules() if isinstance(m, QuantizedLinear) and "language" not in path]
    assert towers == ["lm_head"]
    reasons = [entry["reason"] for entry in artifact.manifest["body"]["left"]]
    assert "images or sound pass through it beside the language model; an entry of `layers` quantizes it" in reasons


def test_the_vision_tower_is_quantized_on_request(small_run):
    layers = [{"match": "re:model[.]vision_tower[.].*", "scheme": "W8A8"}]
    artifact = small_run(llava(), "W4A8", recipe=RTN | {"layers": layers}, calibration=pairs())
    assert artifact.manifest["schemes"]["W8A8"] == 12
    assert artifact.manifest["coverage"]["model.multi_modal_projector.linear_1.weight"].startswith("images or sound")


def test_a_model_that_computes_something_else_than_its_graph_gets_no_directory(small_run, tmp_path, monkeypatch):
    model, forward = llava(), LlavaForConditionalGeneration.forward

    @functools.wraps(forward)
    def otherwise(*args, **more):
        found = forward(*args, **more)
        found.logits = found.logits * (1 if torch.compiler.is_exporting() else 2)
        return found

    monkeypatch.setattr(LlavaForConditionalGeneration, "forward", otherwise)
    with pytest.raises(QuantizeError, match="on input_ids and pixel_values the model computes something else"):
        small_run(model, "W8A8", recipe=RTN, calibration=pairs(4))
    assert not (tmp_path / "out").exists()


def test_gemma_3_takes_pairs_in_batches():
    torch.manual_seed(0)
    text = TEXT | {"layer_types": ["full_attention"]}
    config = Gemma3Config(text_config=text, vision_config=VISION, mm_tokens_per_image=TOKENS, image_token_index=IMAGE)
    program = program_of(Gemma3ForConditionalGeneration(config))
    assert program.batch is None
    assert len(program.towers) == 6 + 1


@pytest.mark.slow
def test_gemma_3_takes_the_mask_of_its_processor(small_run):
    """`token_type_ids` mark an image's places, which see each other; the mask of a sliding layer is made by `vmap`."""
    torch.manual_seed(0)
    text = TEXT | {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}
    config = Gemma3Config(text_config=text, vision_config=VISION, mm_tokens_per_image=TOKENS, image_token_index=IMAGE)
    given = pairs(4)
    given["token_type_ids"] = (given["input_ids"] == IMAGE).long()
    artifact = small_run(Gemma3ForConditionalGeneration(config).eval(), "W8A8", recipe=RTN, calibration=given)
    assert artifact.manifest["export"]["exported"]
