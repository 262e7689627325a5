"""A fine-tuned or planted model is a copy of a model's directory with other weights."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from quantize.artifact.writer import ArtifactWriter, as_json
from quantize.checkpoint.checkpoint import Checkpoint


def save_float_model(checkpoint: Checkpoint, writer: ArtifactWriter, weights: Mapping[str, Tensor]) -> None:
    """Write weights with the config, tokenizer and other side files of a model, and let the directory appear.

    Args:
        checkpoint: the model that the weights belong to, with its config and buffers.
        writer: an open writer.
        weights: each parameter by one of its names; they are stored as float32.

    Raises:
        QuantizeError: the disk is full or not writable.
    """
    tensors = {name: weight.detach().float() for name, weight in weights.items()}
    writer.add("model.safetensors", checkpoint.buffers() | tensors)
    writer.write("config.json", as_json(checkpoint.config | {"dtype": "float32"}))
    for path in checkpoint.side_files:
        writer.write(path.relative_to(checkpoint.directory or path), checkpoint.seen.read(path))
    checkpoint.seen.require_all_same()
    writer.publish()
