"""Models are built from their config without weights, and tensors are put into them."""

from __future__ import annotations

from typing import Any

import transformers
from accelerate import init_empty_weights
from torch import Tensor, nn

from quantize.errors import QuantizeError, UsageError, reason


def build_skeleton(config: dict[str, Any]) -> nn.Module:
    """Build the model class that a config names without weights; code from the model's directory is never run.

    Raises:
        UsageError: transformers has no such class, or the config does not fit it.
    """
    architecture = str(config["architectures"][0])
    cls = getattr(transformers, architecture, None)
    if not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)):
        raise UsageError(
            f"transformers {transformers.__version__} has no {architecture}, and code that models bring is not run"
        )
    try:
        with init_empty_weights(include_buffers=False):
            model: transformers.PreTrainedModel = cls(cls.config_class.from_dict(with_floats(config)))  # type: ignore[attr-defined]
    except Exception as error:  # validators and constructors by many authors raise anything
        raise UsageError(f"the config does not build a {architecture}: {reason(error)}") from None
    model.tie_weights()
    return model  # type: ignore[no-any-return]


def with_floats(value: Any) -> Any:
    """Return JSON with the floats that JSON has no word for; transformers writes `{"__float__": "Infinity"}`."""
    if isinstance(value, dict):
        special = value.get("__float__") if len(value) == 1 else None
        return float(special) if isinstance(special, str) else {key: with_floats(item) for key, item in value.items()}
    return [with_floats(item) for item in value] if isinstance(value, list) else value


def assign_and_tie(model: nn.Module, tensors: dict[str, Tensor]) -> list[str]:
    """Put tensors into a model in place of its own and tie what was tied, unless each has a tensor of its own.

    Returns:
        The parameters without a tensor, and the tensors without a place.
    """
    ties = ties_of(model)
    unexpected = load_tensors(model, tensors)
    missing = [name for name in ties if name not in tensors]
    for name in list(missing):
        if stored := next((other for other in ties[name] if other in tensors), None):
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, model.get_parameter(stored))
            missing.remove(name)
    return [*missing, *unexpected]


def load_tensors(model: nn.Module, tensors: dict[str, Tensor]) -> list[str]:
    """Put tensors into a model in place of its own, and return those that have no place in it.

    Raises:
        QuantizeError: a tensor has another shape, or a parameter would hold integers.
    """
    places = dict(model.named_parameters(remove_duplicate=False))
    for name, tensor in tensors.items():
        if name in places and not tensor.is_floating_point():
            raise QuantizeError(f"{name} is of {tensor.dtype}, where the model has floating point")
    try:
        return list(model.load_state_dict(tensors, strict=False, assign=True).unexpected_keys)
    except RuntimeError as error:  # the first line names the class, the next one says what is wrong
        raise QuantizeError(f"the tensors do not fit the model: {reason(error)}") from None


def ties_of(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Map each parameter name to all the names of that parameter."""
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    return {name: tuple(names) for names in groups.values() for name in names}
