"""The families of `make bench-families`: which class of transformers, and what its config needs to be tiny."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from benchmarks.families.modules import MODULES
from benchmarks.families.tiny import build, tiny_config


@dataclass(frozen=True)
class Family:
    """A family of models.

    Attributes:
        kind: the heading under which the table has it.
        model_type: the model type of transformers.
        architecture: the class; None is the causal language model of the type.
        changes: settings of the config that differ from the usual small sizes.
    """

    kind: str
    model_type: str
    architecture: str | None = None
    changes: dict[str, Any] = field(default_factory=dict)

    def build(self) -> nn.Module:
        """Return the model with random weights, in evaluation mode."""
        if self.kind == MODULE:
            return MODULES[self.model_type]()
        model: nn.Module = build(self.architecture, tiny_config(self.model_type, **self.changes))
        return model


DECODER, MIXTURE, RECURRENT = "Decoders", "Mixtures of experts", "Decoders with recurrent or convolutional layers"
ENCODER, PAIR, VISION = "Encoders", "Encoder-decoders", "Vision"
SOUND, SEVERAL, MODULE = "Sound", "Images and text", "Modules that transformers does not know"
FAMILIES: dict[str, Family] = {}
Settings = dict[str, Any]


def add(kind: str, model_type: str, architecture: str | None = None, name: str = "", **changes: Any) -> None:
    """Add a family under its model type or another name."""
    FAMILIES[name or model_type] = Family(kind, model_type, architecture, changes)


TWO_KINDS = ["sliding_attention", "full_attention"]
SLIDING: Settings = {"layer_types": TWO_KINDS, "sliding_window": 16}
for plain in ("llama", "qwen2", "qwen3", "mistral", "phi3", "gpt2", "opt", "gpt_neox", "falcon", "bloom", "gemma",
              "olmo2", "smollm3", "glm4", "granite", "ministral3", "stablelm", "starcoder2", "gptj", "mpt", "cohere",
              "nemotron", "gpt_bigcode", "biogpt", "bitnet", "doge", "openai-gpt", "ctrl"):  # fmt: skip
    add(DECODER, plain)
add(DECODER, "youtu", num_key_value_heads=4)
for sliding in ("gemma3_text", "cohere2", "olmo3"):
    add(DECODER, sliding, **SLIDING)
for windowed in ("gemma2", "cwm"):
    add(DECODER, windowed, sliding_window=16)
add(DECODER, "phi", partial_rotary_factor=0.5)
add(DECODER, "gpt_neo", attention_types=[[["global", "local"], 1]], num_layers=2)
add(DECODER, "xglm", attention_heads=4, num_layers=2)
add(DECODER, "xlnet", d_inner=128)
add(DECODER, "gemma4_text", **SLIDING, hidden_size_per_layer_input=16, vocab_size_per_layer_input=384,
    num_kv_shared_layers=0)  # fmt: skip
add(DECODER, "gemma3n_text", num_hidden_layers=5, num_kv_shared_layers=2, hidden_size_per_layer_input=16,
    layer_types=["sliding_attention", *TWO_KINDS, *TWO_KINDS], vocab_size_per_layer_input=384, laurel_rank=8,
    altup_num_inputs=2, sliding_window=16, activation_sparsity_pattern=[0.0] * 5, intermediate_size=128)  # fmt: skip

for mixture in ("mixtral", "qwen2_moe", "olmoe", "granitemoe", "granitemoeshared", "phimoe", "minimax_m2"):
    add(MIXTURE, mixture)
add(MIXTURE, "qwen3_moe", num_experts=8)
add(MIXTURE, "gpt_oss", **SLIDING)
add(MIXTURE, "deepseek_v2", num_key_value_heads=4, topk_method="greedy", num_experts_per_tok=2)
add(MIXTURE, "deepseek_v3", moe_layer_freq=1, num_key_value_heads=4)
add(MIXTURE, "glm4_moe", n_routed_experts=8)
add(MIXTURE, "glm4_moe_lite", num_key_value_heads=4)
add(MIXTURE, "llama4_text", layer_types=["chunked_attention", "full_attention"], intermediate_size_mlp=128,
    attention_chunk_size=16)  # fmt: skip
add(MIXTURE, "ernie4_5_moe", moe_layer_start_index=0, moe_layer_end_index=-1, moe_layer_interval=1,
    moe_num_shared_experts=1)  # fmt: skip
add(MIXTURE, "dbrx", attn_config={"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0},
    ffn_config={"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 64})  # fmt: skip
add(MIXTURE, "longcat_flash", num_key_value_heads=4, num_layers=1, zero_expert_num=2, ffn_hidden_size=128)

add(RECURRENT, "mamba")
add(RECURRENT, "falcon_mamba")
add(RECURRENT, "mamba2", num_heads=8, head_dim=16, n_groups=1, chunk_size=16)
add(RECURRENT, "falcon_h1")
add(RECURRENT, "bamba", attn_layer_indices=[1])
add(RECURRENT, "granitemoehybrid", layer_types=["mamba", "attention"])
add(RECURRENT, "nemotron_h", layers_block_type=["mamba", "attention", "moe"], num_hidden_layers=3, ssm_state_size=16,
    n_groups=1, chunk_size=16, moe_latent_size=None, moe_shared_expert_intermediate_size=64)  # fmt: skip
add(RECURRENT, "zamba2", num_hidden_layers=3, layers_block_type=["mamba", "hybrid", "mamba"], num_mem_blocks=1,
    attention_head_dim=32, mamba_headdim=16, n_mamba_heads=8, mamba_ngroups=1, adapter_rank=8, use_mem_rope=False,
    chunk_size=16)  # fmt: skip
add(RECURRENT, "zamba", num_hidden_layers=4, layers_block_type=["mamba", "hybrid", "mamba", "hybrid"],
    use_mamba_kernels=False, attention_hidden_size=128, attention_head_dim=32, n_mamba_heads=2)  # fmt: skip
add(RECURRENT, "jamba", attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1,
    use_mamba_kernels=False)  # fmt: skip
add(RECURRENT, "lfm2", layer_types=["conv", "full_attention"], block_ff_dim=128, block_auto_adjust_ff_dim=False)
add(RECURRENT, "lfm2_moe", layer_types=["conv", "full_attention"], num_dense_layers=1)
for hybrid in ("qwen3_5_text", "qwen3_5_moe_text", "qwen3_next"):
    add(RECURRENT, hybrid, num_hidden_layers=4)
add(RECURRENT, "minimax", layer_types=["linear_attention", "full_attention"], block_size=16)
add(RECURRENT, "recurrent_gemma", num_hidden_layers=3, attention_window_size=16)
add(RECURRENT, "rwkv", attention_hidden_size=64)

for encoder, architecture in {"bert": "BertModel", "roberta": "RobertaModel", "xlm-roberta": "XLMRobertaModel",
                              "mpnet": "MPNetModel", "albert": "AlbertModel", "nomic_bert": "NomicBertModel",
                              "ernie": "ErnieModel", "xlm": "XLMModel", "squeezebert": "SqueezeBertModel",
                              "mobilebert": "MobileBertModel", "fnet": "FNetModel",
                              "convbert": "ConvBertModel", "ibert": "IBertModel"}.items():  # fmt: skip
    add(ENCODER, encoder, architecture)
add(ENCODER, "distilbert", "DistilBertModel", hidden_dim=128)
add(ENCODER, "modernbert", "ModernBertModel", num_hidden_layers=3)
add(ENCODER, "deberta-v2", "DebertaV2Model", relative_attention=True, position_buckets=32, norm_rel_ebd="layer_norm",
    share_att_key=True, pos_att_type=["p2c", "c2p"], position_biased_input=False,
    max_relative_positions=-1)  # fmt: skip
add(ENCODER, "longformer", "LongformerModel", attention_window=[16, 16])
add(ENCODER, "big_bird", "BigBirdModel", attention_type="original_full")
add(ENCODER, "bert", "BertForMaskedLM", "bert, masked words")
add(ENCODER, "bert", "BertForSequenceClassification", "bert, classes")
add(ENCODER, "qwen3", "Qwen3Model", "qwen3, embeddings")
add(ENCODER, "llama", "LlamaForSequenceClassification", "llama, classes", pad_token_id=0)
add(ENCODER, "t5", "T5EncoderModel", "t5, encoder")

for pair, architecture in {"t5": "T5", "mt5": "MT5", "bart": "Bart", "mbart": "MBart", "m2m_100": "M2M100",
                           "pegasus": "Pegasus", "switch_transformers": "SwitchTransformers"}.items():  # fmt: skip
    add(PAIR, pair, f"{architecture}ForConditionalGeneration")
add(PAIR, "marian", "MarianMTModel", decoder_vocab_size=384, scale_embedding=True)
add(PAIR, "whisper", "WhisperForConditionalGeneration", num_mel_bins=16, suppress_tokens=None,
    begin_suppress_tokens=None)  # fmt: skip

SQUARE: Settings = {"image_size": 32, "patch_size": 8}
for seeing, architecture in {"vit": "ViTForImageClassification", "deit": "DeiTForImageClassification",
                             "beit": "BeitForImageClassification", "dinov2": "Dinov2Model",
                             "dinov2_with_registers": "Dinov2WithRegistersModel", "vit_mae": "ViTMAEModel",
                             "clip_vision_model": "CLIPVisionModel",
                             "siglip_vision_model": "SiglipVisionModel"}.items():  # fmt: skip
    add(VISION, seeing, architecture, **SQUARE)
FOUR: Settings = {"hidden_sizes": [32, 64, 64, 64], "depths": [1, 1, 1, 1]}
RESNET: Settings = {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1]}
add(VISION, "swin", "SwinForImageClassification", image_size=32, patch_size=4, embed_dim=32, depths=[2, 2],
    num_heads=[2, 4], window_size=4)  # fmt: skip
add(VISION, "convnext", "ConvNextForImageClassification", image_size=32, **FOUR)
add(VISION, "convnextv2", "ConvNextV2ForImageClassification", image_size=32, **FOUR)
add(VISION, "segformer", "SegformerForSemanticSegmentation", **FOUR, num_attention_heads=[1, 2, 2, 4],
    decoder_hidden_size=64)  # fmt: skip
add(VISION, "resnet", "ResNetForImageClassification", **RESNET)
add(VISION, "detr", "DetrForObjectDetection", num_queries=8, use_timm_backbone=False, use_pretrained_backbone=False,
    backbone=None, backbone_config={"model_type": "resnet", **RESNET, "out_features": ["stage2"]})  # fmt: skip
add(VISION, "mobilevit", "MobileViTForImageClassification", image_size=64)
add(VISION, "depth_anything", "DepthAnythingForDepthEstimation", patch_size=8, neck_hidden_sizes=[16, 32, 32, 64],
    backbone_config={"model_type": "dinov2", "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
                     **SQUARE, "out_indices": [1, 2, 3, 4], "apply_layernorm": True, "reshape_hidden_states": False},
    reassemble_hidden_size=64, fusion_hidden_size=32, head_hidden_size=16)  # fmt: skip

WAVES: Settings = {"conv_dim": [32, 32], "conv_stride": [5, 4], "conv_kernel": [10, 8], "num_feat_extract_layers": 2,
         "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4}  # fmt: skip
add(SOUND, "wav2vec2", "Wav2Vec2ForCTC", **WAVES)
add(SOUND, "hubert", "HubertForCTC", **WAVES)

TEXT: Settings = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "intermediate_size": 128, "vocab_size": 384, "max_position_embeddings": 256, "pad_token_id": 0,
        "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
EYES: Settings = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128,
                  **SQUARE}  # fmt: skip
MROPE: Settings = {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}}
QWEN: Settings = {"hidden_size": 64, "depth": 2, "num_heads": 4, "intermediate_size": 128, "out_hidden_size": 64,
                  "patch_size": 8, "spatial_merge_size": 2}  # fmt: skip
QWEN_IDS: Settings = {"image_token_id": 380, "video_token_id": 381, "vision_start_token_id": 382,
                      "vision_end_token_id": 383}  # fmt: skip
add(SEVERAL, "clip", "CLIPModel", text_config={**TEXT, "projection_dim": 64},
    vision_config={**EYES, "projection_dim": 64}, projection_dim=64)  # fmt: skip
add(SEVERAL, "siglip", "SiglipModel", text_config={**TEXT, "max_position_embeddings": 64}, vision_config=EYES)
add(SEVERAL, "llava", "LlavaForConditionalGeneration", text_config={**TEXT, "model_type": "llama"},
    vision_config={**EYES, "model_type": "clip_vision_model"}, image_token_index=380)  # fmt: skip
add(SEVERAL, "qwen2_vl", "Qwen2VLForConditionalGeneration", text_config={**TEXT, **MROPE}, **QWEN_IDS,
    vision_config={**QWEN, "embed_dim": 64, "hidden_size": 64, "mlp_ratio": 2})  # fmt: skip
add(SEVERAL, "qwen2_5_vl", "Qwen2_5_VLForConditionalGeneration", text_config={**TEXT, **MROPE},
    vision_config={**QWEN, "window_size": 32, "fullatt_block_indexes": [1]}, **QWEN_IDS)  # fmt: skip
add(SEVERAL, "qwen3_vl", "Qwen3VLForConditionalGeneration", text_config={**TEXT, **MROPE, "head_dim": 16},
    vision_config={**QWEN, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]}, **QWEN_IDS)  # fmt: skip
add(SEVERAL, "gemma3", "Gemma3ForConditionalGeneration",
    text_config={**TEXT, **SLIDING, "model_type": "gemma3_text", "head_dim": 16}, mm_tokens_per_image=4,
    vision_config={**EYES, "model_type": "siglip_vision_model"}, image_token_index=380, boi_token_index=381,
    eoi_token_index=382)  # fmt: skip
add(SEVERAL, "paligemma", "PaliGemmaForConditionalGeneration", projection_dim=64, image_token_index=380,
    text_config={**TEXT, "model_type": "gemma", "head_dim": 16},
    vision_config={**EYES, "model_type": "siglip_vision_model", "projection_dim": 64})  # fmt: skip
add(SEVERAL, "idefics3", "Idefics3ForConditionalGeneration", text_config={**TEXT, "model_type": "llama"},
    vision_config=EYES, image_token_id=380, scale_factor=2)  # fmt: skip
add(SEVERAL, "smolvlm", "SmolVLMForConditionalGeneration", text_config={**TEXT, "model_type": "llama"},
    vision_config=EYES, image_token_id=380, scale_factor=2)  # fmt: skip
add(SEVERAL, "mistral3", "Mistral3ForConditionalGeneration", image_token_index=380, spatial_merge_size=2,
    text_config={**TEXT, "model_type": "mistral", "head_dim": 16},
    vision_config={**EYES, "model_type": "pixtral", "head_dim": 16})  # fmt: skip
add(SEVERAL, "internvl", "InternVLForConditionalGeneration", text_config={**TEXT, "model_type": "qwen2"},
    vision_config={**EYES, "image_size": [32, 32], "patch_size": [8, 8]}, image_token_id=380)  # fmt: skip

for module in MODULES:
    add(MODULE, module)
