"""A config may declare any size, so no model is built that is far larger than the files that are to fill it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

# Files of packed integers hold two elements a byte, and tied or merged parameters count twice; the rest is a margin.
ELEMENTS_PER_BYTE, PARAMETERS_PER_TENSOR, SLACK = 4, 8, 1 << 20


@contextlib.contextmanager
def limit_parameters(files: Mapping[str, Path]) -> Iterator[None]:
    """Stop every constructor in the `with` block that makes far more parameters than the files hold.

    Args:
        files: tensor name → file.

    Raises:
        ValueError: it is raised within the constructor, which so cannot go on.
    """
    size = sum(path.stat().st_size for path in set(files.values()))
    elements, parameters = ELEMENTS_PER_BYTE * size + SLACK, PARAMETERS_PER_TENSOR * (len(files) + 8)
    found = [0, 0]

    def count(module: nn.Module, name: str, parameter: Any) -> None:
        del module, name
        found[0] += 1
        found[1] += 0 if parameter is None else parameter.numel()
        if found[0] > parameters or found[1] > elements:
            raise ValueError(
                f"it declares a far larger model than the {len(files)} tensors of {size} bytes in the files"
            )

    handle = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        handle.remove()
