"""Whether a weight is stored as [in, out] is told by the class of its module, where transformers has that."""

from __future__ import annotations

from torch import nn

from quantize.checkpoint.checkpoint import Checkpoint
from quantize.checkpoint.key_mapping import map_keys, plain_names


def transposed_weights(model: nn.Module, checkpoint: Checkpoint, own_names: bool) -> dict[str, bool]:
    """Return whether weights are stored as [in, out], for those of which the model's class tells it.

    Linears of transformers that are written as convolutions of width 1 store it so, and have the numbers `nx` and `nf`;
    classes of experts say it of their stacks (`is_transposed`).

    Args:
        model: the model without weights.
        checkpoint: the files.
        own_names: whether the checkpoint has the model's names, otherwise those in the files.
    """
    found = dict[str, bool]()
    for path, module in model.named_modules():
        shape = getattr(module, "nx", None), getattr(module, "nf", None)
        if isinstance(W := getattr(module, "weight", None), nn.Parameter) and shape == tuple(W.shape):
            found[f"{path}.weight"] = True
        if isinstance(turned := getattr(module, "is_transposed", None), bool):
            stacks = (name for name, p in module.named_parameters(recurse=False) if p.dim() == 3)
            found |= {f"{path}.{name}": turned for name in stacks}
    if own_names or not found:
        return found
    sources = map_keys(model, plain_names(model, checkpoint.sources))
    whole = {name: source.names[0] for name, source in sources.items() if source.converter is None}
    return {whole[name]: turned for name, turned in found.items() if name in whole}
