"""Models are built from their config without weights, and tensors are put into them."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from huggingface_hub import constants
from huggingface_hub.errors import OfflineModeIsEnabled
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from quantize.checkpoint.remote_code import own_class, own_class_name
from quantize.checkpoint.size_limits import BUFFER_BYTES, bounded
from quantize.errors import LONGEST, QuantizeError, UsageError, reason, shown

EMPTY = 1 << 20  # elements; more of them without values are a parameter's, and freed ones would leave holes behind
LARGEST = {torch.empty: EMPTY} | dict.fromkeys((torch.zeros, torch.ones, torch.rand, torch.randn), BUFFER_BYTES)


def build_skeleton(
    config: dict[str, Any], files: Mapping[str, Path] | None = None, code: Path | None = None
) -> nn.Module:
    """Build the model class that a config names without weights.

    Args:
        config: the config.
        files: tensor name → the file that holds it; the model may not be far larger. None for a config of one's own.
        code: the model's directory, if the code in it may run; None runs no such code.

    Raises:
        UsageError: transformers has no such class, or the config does not fit it, asks for far more than the files
            hold, or names a part that lies on the hub.
    """
    cls, bounds = model_class(config, code), contextlib.nullcontext() if files is None else bounded(files)
    try:
        with init_empty_weights(include_buffers=False), offline(), LargeOnMeta(), bounds:  # what these raise ends there
            model: transformers.PreTrainedModel = cls(cls.config_class.from_dict(with_floats(without_kernels(config))))  # type: ignore[attr-defined]
    except OfflineModeIsEnabled:
        raise UsageError(
            f"the config of the {cls.__name__} names a part that lies on the hub, such as its `backbone`, and a local "
            "directory never goes to the network; save the model anew with save_pretrained, which writes that part's "
            "config into its own"
        ) from None
    except Exception as error:  # validators and constructors by many authors raise anything
        raise UsageError(f"the config does not build a {cls.__name__}: {reason(error)}") from None
    model.tie_weights()
    return model  # type: ignore[no-any-return]


class LargeOnMeta(TorchFunctionMode):
    """Makes tensors of more elements than any buffer has on the meta device, as a parameter is made and then moved."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run a function of torch."""
        kwargs = kwargs or {}
        if func in LARGEST and kwargs.get("device") is None:
            sizes = args[0] if args and not isinstance(args[0], int) else args or kwargs.get("size", ())
            if math.prod(sizes) > LARGEST[func]:
                kwargs = {**kwargs, "device": "meta"}
        return func(*args, **kwargs)


def build_on_meta(config: dict[str, Any], files: Mapping[str, Path], code: Path | None = None) -> nn.Module:
    """Build a model with its buffers, too, on the meta device, where no size costs memory; arguments as above."""
    with torch.device("meta"):
        return build_skeleton(config, files, code)


def build_bounded(config: dict[str, Any], files: Mapping[str, Path], code: Path | None = None) -> nn.Module:
    """Build on the meta device first, so that nothing real is built that is too large; arguments as above."""
    build_on_meta(config, files, code)
    return build_skeleton(config, files, code)


def model_class(config: dict[str, Any], code: Path | None = None) -> type[nn.Module]:
    """Return the class of transformers that a config names, or else the one that the directory `code` defines.

    Raises:
        UsageError: there is none.
    """
    if (cls := native_class(config)) is not None:
        return cls
    architecture, reference = str(config["architectures"][0]), own_class_name(config)
    if code is not None and reference is not None:
        return own_class(code, reference)
    code_of = (
        f"code of the model's own ({shown(reference)}) runs only with" if reference else "its config names no code for"
    )
    raise UsageError(
        f"transformers {transformers.__version__} has no {architecture[:LONGEST]}, and {code_of} --trust-remote-code; "
        "or build the model yourself and give quantize_model the module; or round its weights without the model, with "
        "--model-free"
    )


def native_class(config: dict[str, Any]) -> type[nn.Module] | None:
    """Return the class of transformers itself that a config names, if there is one."""
    cls = getattr(transformers, str(config["architectures"][0]), None)
    return cls if isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel) else None


@contextlib.contextmanager
def offline() -> Iterator[None]:
    """Keep transformers from the network, which constructors of models with a `backbone` by name would go to."""
    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def without_kernels(value: Any) -> Any:
    """Return a config without the kernels it wants to run with, whose code would come from the hub."""
    if isinstance(value, dict):
        return {k: without_kernels(x) for k, x in value.items() if not str(k).endswith("_implementation")}
    return value


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
