"""Examples of what a model's `forward` takes are made from argument names and the config, never from a model's name."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quantize.errors import QuantizeError

BATCH, SEQUENCE = 2, 8  # so large that no size is taken for a broadcast


@dataclass(frozen=True)
class Input:
    """An example of one input, on the meta device, and the axes whose size may vary."""

    example: Tensor
    dynamic: tuple[int, ...]


def example_inputs(model: nn.Module) -> dict[str, Input]:
    """Return an example of each input by argument of `forward`; a module that declares none takes token ids first.

    Raises:
        QuantizeError: the model declares an input of which nothing is known.
    """
    config, arguments = getattr(model, "config", None), list(inspect.signature(model.forward).parameters)
    main = getattr(model, "main_input_name", None)
    names = [main if main in arguments else arguments[0]]
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in arguments:
        names.append("decoder_input_ids")
    declared = main is not None
    return {name: make_input(name, model) if declared else token_ids(model) for name in names}


def make_input(name: str, model: nn.Module) -> Input:
    """Make an example of an input from the name of its argument."""
    if name not in KINDS:
        raise QuantizeError(f"the model takes `{name}`; known are {', '.join(KINDS)}")
    return KINDS[name](model)


def token_ids(model: nn.Module) -> Input:
    """Return example token ids, int64 [batch, sequence]."""
    del model
    return Input(torch.zeros(BATCH, SEQUENCE, dtype=torch.long, device="meta"), (0, 1))


def pixels(model: nn.Module) -> Input:
    """Return an example image, float32 [batch, channels, height, width]."""
    config: Any = model.config
    config = getattr(config, "vision_config", config)
    size = config.image_size
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return Input(torch.zeros(BATCH, getattr(config, "num_channels", 3), height, width, device="meta"), (0,))


def audio_features(model: nn.Module) -> Input:
    """Return example features of sound, float32 [batch, mel bins, frames].

    The frames are the encoder's positions times the strides of the convolutions in front.
    """
    config: Any = model.config
    stride = math.prod(module.stride[0] for module in model.modules() if isinstance(module, nn.Conv1d))
    return Input(torch.zeros(BATCH, config.num_mel_bins, config.max_source_positions * stride, device="meta"), (0,))


KINDS: dict[str, Callable[[nn.Module], Input]] = {
    "input_ids": token_ids,
    "decoder_input_ids": token_ids,
    "pixel_values": pixels,
    "input_features": audio_features,
}
