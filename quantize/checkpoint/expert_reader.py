"""One expert of a stack is read without the others, be the stack one tensor in the files or put together from many."""

from __future__ import annotations

from torch import Tensor

from quantize.checkpoint.checkpoint import Checkpoint
from quantize.checkpoint.key_mapping import StoredTensor


def read_expert(checkpoint: Checkpoint, name: str, number: int, count: int) -> Tensor:
    """Read the weights of one expert in float32, [...].

    Args:
        checkpoint: the model.
        name: the stack, [experts, ...].
        number: the expert.
        count: the number of experts.

    Raises:
        QuantizeError: the stack is missing or cannot be read.
    """
    source = checkpoint.source_of(name)
    if source is None:
        return checkpoint.tensor(name)[number].float()
    if source.converter is None and not checkpoint.is_encoded(name):
        return checkpoint.read_part(source.names[0], number, 1)[0].float()
    part = None if source.converter is None else part_of(source, number, count)
    made = checkpoint.float_tensor(name) if part is None else part.read(name, checkpoint.read_as_float)
    return (made[0] if len(made) == 1 else made[number]).float()


def reads_alone(checkpoint: Checkpoint, name: str, count: int) -> bool:
    """Return whether `read_expert` reads one expert of a stack and no other."""
    if checkpoint.module is not None or checkpoint.is_config_alone:
        return True
    source = checkpoint.source_of(name)
    if source is None or source.converter is None:
        return source is not None and not checkpoint.is_encoded(name)
    return part_of(source, 0, count) is not None


def part_of(stored: StoredTensor, number: int, count: int) -> StoredTensor | None:
    """Return where one expert lies if each kind of part is there once for each expert; None if not.

    The parts of a kind are in the order of the experts, as transformers stacks them.
    """
    kinds: dict[str, list[str]] = {}
    for name, pattern in zip(stored.names, stored.patterns, strict=True):
        kinds.setdefault(pattern, []).append(name)
    if any(len(names) != count for names in kinds.values()):
        return None
    return StoredTensor(tuple(names[number] for names in kinds.values()), tuple(kinds), stored.converter)
