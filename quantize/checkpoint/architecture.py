"""A config that names no architecture: the class follows from the model's type and from what its files hold."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers.models.auto import modeling_auto

from quantize.checkpoint.key_mapping import map_keys, plain_names
from quantize.checkpoint.meta_model import build_on_meta, ties_of
from quantize.errors import UsageError, shown

HEADS = ("SEQ_TO_SEQ_CAUSAL_LM", "MASKED_LM", "CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "SEQUENCE_CLASSIFICATION",
         "TOKEN_CLASSIFICATION", "QUESTION_ANSWERING", "IMAGE_CLASSIFICATION", "SPEECH_SEQ_2_SEQ")  # fmt: skip


def name_architecture(config: Mapping[str, Any], files: Mapping[str, Path]) -> str:
    """Return the class of transformers for a model's type that lacks the fewest tensors and leaves the fewest over.

    Args:
        config: a config with `model_type`.
        files: tensor name → the file that holds it.

    Raises:
        UsageError: the config has no type, or transformers has no class for it.
    """
    kind = config.get("model_type")
    candidates = (
        list(dict.fromkeys(classes_of(kind, config.get("is_decoder") is True))) if isinstance(kind, str) else []
    )
    if not candidates:
        raise UsageError(
            f"config.json names no architecture, and its model_type is {shown(kind)}, for which transformers has no "
            "class; add the key architectures, or round the weights without the model, with --model-free"
        )
    fits = [misfit({**config, "architectures": [name]}, files) for name in candidates]
    return candidates[fits.index(min(fits))]


def classes_of(kind: str, decodes: bool) -> Iterator[str]:
    """Yield the names of the classes for a type of model; those with a head come first, the bare one last.

    Args:
        kind: the type.
        decodes: whether the config makes a decoder of what is an encoder otherwise.
    """
    heads = [head for head in HEADS if not decodes or head != "MASKED_LM"]
    tables = [getattr(modeling_auto, f"MODEL_FOR_{head}_MAPPING_NAMES") for head in heads]
    for table in (*tables, modeling_auto.MODEL_MAPPING_NAMES):
        found = table.get(kind, ())
        yield from [found] if isinstance(found, str) else found


def misfit(config: dict[str, Any], files: Mapping[str, Path]) -> tuple[int, int]:
    """Return how many parameters of a class the files lack, and how many of their tensors have no place in it."""
    try:
        model = build_on_meta(config, files)
    except UsageError:  # a head that this config has no numbers for
        return len(files), len(files)
    found, ties = map_keys(model, plain_names(model, files)).keys(), ties_of(model)
    lacking = sum(not any(name in found for name in names) for names in set(ties.values()))
    return lacking, len(found - model.state_dict().keys())
