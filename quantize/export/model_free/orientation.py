"""Whether a weight is stored as [in, out] is told by the class of its module, where transformers has that."""

from __future__ import annotations

from torch import nn
from transformers.pytorch_utils import Conv1D

from quantize.checkpoint.checkpoint import Checkpoint
from quantize.checkpoint.key_mapping import map_keys, plain_names


def transposed_weights(model: nn.Module, checkpoint: Checkpoint, own_names: bool) -> dict[str, bool]:
    """Return whether weights are stored as [in, out], for those of which the model's class tells it.

    Transformers' `Conv1D` stores its weight so; classes of experts say it of their stacks (`is_transposed`).

    Args:
        model: the model without weights.
        checkpoint: the files.
        own_names: whether the checkpoint has the model's names, otherwise those in the files.
    """
    found = {f"{path}.weight": True for path, module in model.named_modules() if isinstance(module, Conv1D)}
    for path, module in model.named_modules():
        if isinstance(turned := getattr(module, "is_transposed", None), bool):
            stacks = (name for name, p in module.named_parameters(recurse=False) if p.dim() == 3)
            found |= {f"{path}.{name}": turned for name in stacks}
    if own_names or not found:
        return found
    sources = map_keys(model, plain_names(model, checkpoint.sources))
    whole = {name: source.names[0] for name, source in sources.items() if source.converter is None}
    return {whole[name]: turned for name, turned in found.items() if name in whole}
