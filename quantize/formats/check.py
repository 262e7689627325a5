"""Settings in recipes and manifests are checked against their number formats."""

from __future__ import annotations

from typing import TypeVar

from quantize.errors import shown
from quantize.formats.base import FORMATS, get_format
from quantize.scheme.scheme import ActivationArgs, Scheme, WeightArgs

Args = TypeVar("Args", WeightArgs, ActivationArgs)


def check_args(args: Args) -> Args:
    """Return the settings, if there is such a format and it allows them.

    Raises:
        ValueError: there is no such format, or it does not allow a setting; the message is a sentence.
    """
    if args.format not in FORMATS:
        raise ValueError(f"there is no number format {shown(args.format)}; known are {', '.join(sorted(FORMATS))}")
    get_format(args.format).check(args)
    return args


def check_scheme(scheme: Scheme) -> Scheme:
    """Return the scheme, if formats allow its weights and activations and can multiply them.

    Raises:
        ValueError: they do not, or cannot; the message is a sentence.
    """
    weights, activations = scheme.weights, scheme.activations
    wanted = get_format(check_args(weights).format).activation_format
    if activations is None or check_args(activations).format == wanted:
        return scheme
    remedy = f"give activations the format {wanted}" if wanted else "leave activations in floating point (W4A16)"
    raise ValueError(f"{weights.format} weights and {activations.format} activations have no product; {remedy}")
