"""What training saves of wrapped models has names with a prefix: `module.`, `_orig_mod.`, `base_model.model.`."""

from __future__ import annotations

from collections.abc import Callable, Collection

# torch puts these in front of a wrapped module's own names, wherever it stands in the model.
TORCH_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}


def unwrapped(names: Collection[str], find: Callable[[str], str], known: Collection[str]) -> dict[str, str]:
    """Map names in files to the names that they have without what wrappers put in front.

    What torch's wrappers add is dropped everywhere. A prefix that all names share is dropped as far as that lets the
    model find the most of them.

    Args:
        names: the names in the files.
        find: returns the name in the model for a plain name, whether there is such a one or not.
        known: the names in the model.
    """
    plain = {name: ".".join(part for part in name.split(".") if part not in TORCH_WRAPPERS) for name in names}
    best, most, depth = plain, count(plain, find, known), shared_depth(plain.values())
    for length in range(1, depth + 1 if most[0] < len(known) else 1):
        cut = {name: ".".join(short.split(".")[length:]) for name, short in plain.items()}
        if (found := count(cut, find, known)) > most:
            best, most = cut, found
    return best


def count(names: dict[str, str], find: Callable[[str], str], known: Collection[str]) -> tuple[int, int]:
    """Return how many names of the model some plain names lead to, and how many of these are the same names."""
    return len({find(short) for short in names.values()} & set(known)), len({*names.values()} & set(known))


def shared_depth(names: Collection[str]) -> int:
    """Return how many parts all names begin with, of which none is a whole name."""
    split = [name.split(".") for name in names]
    depth = 0
    while split and all(len(parts) > depth + 1 and parts[: depth + 1] == split[0][: depth + 1] for parts in split):
        depth += 1
    return depth


def dropped(plain: dict[str, str]) -> list[str]:
    """Say in a sentence what `unwrapped` dropped, if it did."""
    changed = [(name, short) for name, short in sorted(plain.items()) if name != short]
    where = "names as training with a wrapper saves them"
    return [f"{len(changed)} tensors have {where}: {changed[0][0]} is taken as {changed[0][1]}"] if changed else []
