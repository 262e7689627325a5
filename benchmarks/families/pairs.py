"""Pairs of an image and a text as the processors of models of images and text give them, with random numbers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

IMAGE, START, END = 380, 382, 383  # ids of an image's place, and of what stands around an image
SIDE, PATCH, FIRST = 32, 8, 2  # pixels of an image's and of a patch's side, and the place of an image's first token
# Model type → the tokens of an image
PLACES = {"llava": 16, "gemma3": 4, "paligemma": 16, "idefics3": 4, "smolvlm": 4, "internvl": 4, "mistral3": 4,
          "qwen2_vl": 4, "qwen2_5_vl": 4, "qwen3_vl": 4}  # fmt: skip


def random_pairs(model: nn.Module, count: int, tokens: int, seed: int) -> dict[str, Tensor]:
    """Return `count` texts of `tokens` ids with an image in each, and what else a model's processor returns."""
    generator = torch.Generator().manual_seed(seed)
    config: Any = model.config
    kind: str = config.model_type
    ids = torch.randint(3, IMAGE - 4, (count, tokens), generator=generator)
    ids[:, FIRST : FIRST + PLACES[kind]] = IMAGE
    marks = (ids == IMAGE).long()
    if kind.startswith("qwen"):
        ids[:, FIRST - 1], ids[:, FIRST + PLACES[kind]] = START, END
        patches = (SIDE // PATCH) ** 2
        channels = config.vision_config.in_channels * config.vision_config.temporal_patch_size * PATCH**2
        images = torch.randn(count, patches, channels, generator=generator)
        grid = torch.tensor([[1, SIDE // PATCH, SIDE // PATCH]]).repeat(count, 1)
        return {"input_ids": ids, "pixel_values": images, "image_grid_thw": grid, "mm_token_type_ids": marks}
    images = torch.randn(count, 3, SIDE, SIDE, generator=generator)
    given = {"input_ids": ids, "pixel_values": images[:, None] if kind in ("idefics3", "smolvlm") else images}
    if kind == "mistral3":
        given["image_sizes"] = torch.tensor([[SIDE, SIDE]]).repeat(count, 1)
    if kind in ("gemma3", "paligemma"):
        given["token_type_ids"] = marks if kind == "gemma3" else torch.zeros_like(ids)
    return given
