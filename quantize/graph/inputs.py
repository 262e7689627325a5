"""Examples of what a model's `forward` takes come from its signature, its config and its data, never from its name."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from quantize.errors import UsageError

BATCH, SEQUENCE = 2, 8  # so large that no size is taken for a broadcast
IMAGE, SOUND = 224, 400  # pixels of a side, and frames behind strides, where neither config nor data say how many
SEEING = ("vision_config", "backbone_config")  # parts of a config that tell of images
IMAGE_SIZES = ("image_size", "input_size")  # what configs call the pixels of a side
NO_INPUTS = ("labels", "return_loss")  # arguments that ask for a loss, if `forward` does without them


@dataclass(frozen=True)
class Input:
    """An example of one input.

    Attributes:
        example: a tensor on the meta device, whose first axis is the samples.
        dynamic: the axes whose size may vary.
        free: axis → what it counts, where the data decide on the one size that all samples have.
        sample: the values of one sample [1, ...], for a model that runs on no others; None where zeros do.
    """

    example: Tensor
    dynamic: tuple[int, ...]
    free: Mapping[int, str] = field(default_factory=dict)
    sample: Tensor | None = None


def example_inputs(model: nn.Module) -> dict[str, Input]:
    """Return an example of each input by argument of `forward`; a module that declares none takes token ids.

    Raises:
        UsageError: the model takes an input of which only data can tell the shape.
    """
    declared = getattr(model, "main_input_name", None) is not None
    return {name: make_input(name, model) if declared else token_ids(model) for name in input_names(model)}


def input_names(model: nn.Module) -> list[str]:
    """Return the arguments of `forward` that a pass needs, the main one first.

    Besides the main input these are the arguments without a default, what a decoder starts from, and the images or the
    sound that go with the text of a model that generates none.

    Raises:
        UsageError: a module that declares no main input takes several, which only data can tell apart.
    """
    taken, required = arguments_of(model), required_arguments(model)
    main = getattr(model, "main_input_name", None)
    if main is None:
        if len(required) > 1:
            raise UsageError(
                f"the model takes {listed(required)}; give a --calibration FILE.safetensors with a tensor for each, "
                "whose first axis is the samples"
            )
        return required or taken[:1]
    names = [main if main in taken else taken[0], *required]
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False) and "decoder_input_ids" in taken:
        names.append("decoder_input_ids")
    elif not getattr(model, "can_generate", lambda: True)():
        modalities = getattr(model, "input_modalities", ())
        beside = {"image": "pixel_values", "audio": "input_features"} if "text" in modalities else {}
        names += [name for kind, name in beside.items() if kind in modalities and name in taken]
    return list(dict.fromkeys(names))


def arguments_of(model: nn.Module) -> list[str]:
    """Return the names of the arguments of `forward`."""
    kinds = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    return [name for name, found in inspect.signature(model.forward).parameters.items() if found.kind not in kinds]


def required_arguments(model: nn.Module) -> list[str]:
    """Return the names of the arguments of `forward` that have no default."""
    parameters = inspect.signature(model.forward).parameters
    return [name for name in arguments_of(model) if parameters[name].default is inspect.Parameter.empty]


def listed(names: Sequence[str]) -> str:
    """Return names as a sentence has them: `x, t and labels`."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def inputs_like(model: nn.Module, rows: Sequence[Mapping[str, Tensor]]) -> dict[str, Input]:
    """Return the inputs that samples have, the main one first; an axis that they do not share may vary.

    Args:
        model: the model, of whose `forward` the samples have arguments.
        rows: for each sample the inputs by argument, without a batch axis, of as many axes in each.
    """
    main = getattr(model, "main_input_name", None)
    order = sorted(rows[0], key=[*([main] if main else []), *arguments_of(model), *rows[0]].index)
    found = {}
    for name in order:
        shapes, first = {row[name].shape for row in rows}, rows[0][name]
        varying = (axis for axis in range(first.dim()) if len({shape[axis] for shape in shapes}) > 1)
        example = torch.zeros(BATCH, *first.shape, dtype=first.dtype, device="meta")
        found[name] = Input(example, (0, *(axis + 1 for axis in varying)), sample=first[None])
    return found


def with_sizes(inputs: Mapping[str, Input], tensors: Mapping[str, Tensor]) -> dict[str, Input]:
    """Return inputs of the sizes that a batch, or a sample, has along the axes on which the data decide."""
    found = dict(inputs)
    for name, given in inputs.items():
        axes = given.example.dim()
        if name in tensors and tensors[name].dim() in (axes, axes - 1):
            sizes = tensors[name].shape[-axes + 1 :]
            shape = [sizes[n - 1] if n in given.free else size for n, size in enumerate(given.example.shape)]
            found[name] = replace(given, example=given.example.new_empty(shape))
    return found


def make_input(name: str, model: nn.Module) -> Input:
    """Make an example of an input from the name of its argument.

    Raises:
        UsageError: only data can tell its shape.
    """
    try:
        return KINDS[name](model)
    except (AttributeError, KeyError, TypeError):
        raise UsageError(
            f"the model takes {listed(input_names(model))}; give a --calibration FILE.safetensors with a tensor for "
            "each, whose first axis is the samples"
        ) from None


def token_ids(model: nn.Module) -> Input:
    """Return example token ids, int64 [batch, sequence]."""
    del model
    return Input(torch.zeros(BATCH, SEQUENCE, dtype=torch.long, device="meta"), (0, 1))


def pixels(model: nn.Module) -> Input:
    """Return an example image [batch, channels, height, width], or video [batch, frames, channels, ...], float32."""
    config: Any = model.config
    config = next((found for name in SEEING if (found := getattr(config, name, None)) is not None), config)
    size = next((found for name in IMAGE_SIZES if (found := getattr(config, name, None))), None)
    channels, frames = getattr(config, "num_channels", 3), getattr(config, "num_frames", None)
    height, width = size if isinstance(size, list | tuple) else (size, size) if size else (IMAGE, IMAGE)
    shape = (BATCH, *([frames] if frames else []), channels, height, width)
    free = {} if size else {len(shape) - 2: "height", len(shape) - 1: "width"}
    return Input(torch.zeros(shape, device="meta"), (0,), free)


def waveform(model: nn.Module) -> Input:
    """Return an example of samples of sound, float32 [batch, samples of sound]."""
    config: Any = model.config
    return Input(torch.zeros(BATCH, SOUND * math.prod(config.conv_stride), device="meta"), (0,), {1: "length"})


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
    "input_values": waveform,
    "input_features": audio_features,
}
