"""Whether settings are ones that their number formats allow: asked of recipes and of manifests."""

from __future__ import annotations

from typing import TypeVar

from quantize.errors import shown
from quantize.formats.base import FORMATS, get_format
from quantize.scheme.scheme import ActivationArgs, Scheme, WeightArgs

Args = TypeVar("Args", WeightArgs, ActivationArgs)


def check_args(args: Args) -> Args:
    """The settings themselves, if there is such a format and it allows them.

    Raises:
        ValueError: one sentence that says what it allows.
    """
    if args.format not in FORMATS:
        raise ValueError(f"there is no number format {shown(args.format)}; known are {', '.join(sorted(FORMATS))}")
    get_format(args.format).check(args)
    return args


def check_scheme(scheme: Scheme) -> Scheme:
    """The scheme itself, if its weights and activations are what their formats allow and have a product.

    Raises:
        ValueError: one sentence.
    """
    weights, activations = scheme.weights, scheme.activations
    wanted = get_format(check_args(weights).format).activation_format
    if activations is None or check_args(activations).format == wanted:
        return scheme
    remedy = f"give activations the format {wanted}" if wanted else "leave activations in floating point (W4A16)"
    raise ValueError(f"{weights.format} weights and {activations.format} activations have no product; {remedy}")
