"""What a model is exported with comes from the signature of its `forward`, its config and its data."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    CLIPConfig,
    CLIPModel,
    DetrConfig,
    DetrForObjectDetection,
    LayoutLMv3Config,
    LayoutLMv3Model,
    PatchTSTConfig,
    PatchTSTForPrediction,
    ResNetConfig,
    RTDetrConfig,
    RTDetrForObjectDetection,
    RTDetrResNetConfig,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    VideoMAEConfig,
    VideoMAEForVideoClassification,
    VitPoseConfig,
    VitPoseForPoseEstimation,
    Wav2Vec2Config,
    Wav2Vec2ForCTC,
    WavLMConfig,
    WavLMForCTC,
)

from quantize import load
from quantize.artifact.verify import verify_artifact
from quantize.errors import UsageError
from quantize.graph.inputs import example_inputs
from quantize.nn.quantized_linear import QuantizedLinear

SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
TEXT = SIZES | {
    "vocab_size": 64,
    "max_position_embeddings": 24,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
IMAGE = SIZES | {"image_size": 16, "patch_size": 8}
SOUND = SIZES | {
    "conv_dim": [16, 16], "conv_stride": [5, 4], "conv_kernel": [10, 8], "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4, "vocab_size": 64,
}  # fmt: skip
BACKBONE = {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1]}
HEADS = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
DETECTOR = HEADS | {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "num_queries": 4}


def clip():
    return CLIPModel(CLIPConfig(text_config=TEXT, vision_config=IMAGE, projection_dim=32))


def detr():
    backbone = ResNetConfig(out_features=["stage2"], **BACKBONE)
    return DetrForObjectDetection(
        DetrConfig(
            use_timm_backbone=False, use_pretrained_backbone=False, backbone=None, backbone_config=backbone, **DETECTOR
        )
    )


def rt_detr():
    backbone = RTDetrResNetConfig(out_features=["stage1", "stage2"], **BACKBONE)
    sizes = {"encoder_in_channels": [16, 32], "feat_strides": [4, 8], "num_feature_levels": 2}
    decoder = {"decoder_in_channels": [32, 32], "decoder_n_points": 2, "num_denoising": 0, "encode_proj_layers": [1]}
    config = RTDetrConfig(backbone_config=backbone, encoder_hidden_dim=32, **sizes, **decoder, **DETECTOR)
    return RTDetrForObjectDetection(config)


def segformer():
    sizes = {"hidden_sizes": [16, 32], "depths": [1, 1], "num_attention_heads": [1, 2], "num_encoder_blocks": 2}
    more = {"sr_ratios": [2, 1], "patch_sizes": [7, 3], "strides": [4, 2], "mlp_ratios": [2, 2]}
    return SegformerForSemanticSegmentation(SegformerConfig(decoder_hidden_size=32, **sizes, **more))


def vitpose():
    backbone = {"model_type": "vitpose_backbone", "patch_size": [8, 8], "image_size": [32, 16]}
    return VitPoseForPoseEstimation(VitPoseConfig(num_labels=3, backbone_config=backbone | SIZES))


def layoutlmv3():
    boxes = {"coordinate_size": 4, "shape_size": 8, "max_2d_position_embeddings": 32}
    return LayoutLMv3Model(LayoutLMv3Config(input_size=16, patch_size=8, **boxes, **TEXT))


def videomae():
    return VideoMAEForVideoClassification(VideoMAEConfig(num_frames=4, **IMAGE))


def speech(kind, config):
    return lambda: kind(config(**SOUND))


MODELS = {
    "clip": clip,
    "vitpose": vitpose,
    "layoutlmv3": layoutlmv3,
    "videomae": videomae,
    "detr": detr,
    "rt_detr": rt_detr,
    "segformer": segformer,
    "wav2vec2": speech(Wav2Vec2ForCTC, Wav2Vec2Config),
    "wavlm": speech(WavLMForCTC, WavLMConfig),
}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("clip", {"input_ids": ((2, 8), (0, 1), {}), "pixel_values": ((2, 3, 16, 16), (0,), {})}),
        ("detr", {"pixel_values": ((2, 3, 224, 224), (0,), {2: "height", 3: "width"})}),
        ("vitpose", {"pixel_values": ((2, 3, 32, 16), (0,), {})}),
        ("layoutlmv3", {"input_ids": ((2, 8), (0, 1), {}), "pixel_values": ((2, 3, 16, 16), (0,), {})}),
        ("videomae", {"pixel_values": ((2, 4, 3, 16, 16), (0,), {})}),
        ("wav2vec2", {"input_values": ((2, 8000), (0,), {1: "length"})}),
    ],
)
def test_inputs_come_from_signature_and_config(name, expected):
    found = example_inputs(MODELS[name]())
    assert {name: (tuple(x.example.shape), x.dynamic, x.free) for name, x in found.items()} == expected


def test_an_input_that_no_config_describes_is_asked_for():
    with pytest.raises(UsageError, match=r"takes past_values; give a --calibration FILE\.safetensors with a tensor"):
        example_inputs(PatchTSTForPrediction(PatchTSTConfig(num_input_channels=2, d_model=16, num_hidden_layers=1)))


def inputs_of(name):
    """Return nine random samples of what a model takes."""
    rng = torch.Generator().manual_seed(0)
    if name == "wavlm":
        return {"input_values": torch.randn(9, 800, generator=rng)}
    size = 16 if name == "clip" else 32
    found = {"pixel_values": torch.randn(9, 3, size, size, generator=rng)}
    ids = torch.randint(3, 64, (9, 12), generator=rng)
    return found | ({"input_ids": ids} if size == 16 else {})


@pytest.mark.slow
@pytest.mark.parametrize("name", ["clip", "rt_detr", "segformer", "wavlm"])
def test_a_model_of_images_or_sound_is_quantized_and_loads(small_run, name, tmp_path):
    torch.manual_seed(0)
    model, given = MODELS[name]().eval(), inputs_of(name)
    model.save_pretrained(tmp_path / "model")
    artifact = small_run(tmp_path / "model", "W4A8", calibration=given, nsamples=9, seqlen=512)
    assert artifact.manifest["export"]["exported"], artifact.manifest["export"]
    assert verify_artifact(artifact.directory)["difference"] < 1e-5
    loaded = load(artifact.directory)
    assert sum(isinstance(module, QuantizedLinear) for module in loaded.modules()) >= 5
    with torch.no_grad():
        found, expected = loaded(**given)[0], model(**given)[0]
    assert 0 < float((found - expected).norm() / expected.norm()) < 0.3
