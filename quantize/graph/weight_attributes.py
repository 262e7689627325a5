"""Some models ask the dtype of a linear's weight before they call it, which a linear without that weight can answer."""

from __future__ import annotations

from typing import Any, NoReturn

import torch


class WeightAttributes:
    """The dtype, the device and the shape of a weight that has no values of its own.

    It is no tensor, and no function of torch takes it. `nn.TransformerEncoderLayer` sees that and calls its linears.
    transformers does not initialize it, because it counts as initialized.
    """

    _is_hf_initialized = True

    def __init__(self, dtype: torch.dtype, device: torch.device, shape: tuple[int, ...]) -> None:
        self.dtype, self.device, self.shape = dtype, device, torch.Size(shape)

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"the weight of a quantized linear has no values, and so no `{name}`")

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> NoReturn:
        """Refuse every function of torch."""
        del types, args, kwargs
        raise TypeError(f"the weight of a quantized linear has no values for {getattr(function, '__name__', function)}")
