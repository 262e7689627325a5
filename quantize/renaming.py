"""Names of tensors in files that are older than the model's code."""

from __future__ import annotations

from collections.abc import Iterable

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming


def names_in_files(model: PreTrainedModel, stored: Iterable[str]) -> dict[str, str]:
    """Name in the model → name in its files, where transformers renames tensors as it loads and saves them.

    Args:
        model: without weights.
        stored: names in the files; one that fits the model stays.
    """
    renamings = [step for step in get_model_conversion_mapping(model) if isinstance(step, WeightRenaming)]
    known = model.state_dict().keys()
    return {name if name in known else renamed(name, renamings): name for name in stored}


def renamed(name: str, renamings: Iterable[WeightRenaming]) -> str:
    """A name after all renamings."""
    for renaming in renamings:
        name, _ = renaming.rename_source_key(name)
    return name
