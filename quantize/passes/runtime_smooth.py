"""Divide channels by their current maximum while the model runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar

from pydantic import Field

from quantize.errors import UsageError
from quantize.graph.basis import Basis
from quantize.passes.base import PASSES, LinearContext, Pass
from quantize.scheme.scheme import RuntimeSmoothArgs, Scheme
from quantize.transforms.online import InputTransform


@PASSES.register("runtime_smooth")
class RuntimeSmooth(Pass):
    """Runtime Smooth, or Rotated Runtime Smooth behind the pass `rotate` (Yi et al. 2024, arXiv 2409.20361).

    Nothing is folded. In front of each linear, channels are sorted by their maximum over the tokens that run together,
    and groups of channels share a scale that comes back as one scalar for each K tile. The result of a token therefore
    depends on the tokens it runs with.

    Attributes:
        group_size: the number of channels that share a scale, which is the K tile of a kernel.
        normalize_tokens: whether maxima are taken of tokens scaled to the same root mean square, so that one token with
            several spikes does not set the scale of all others; False is the paper's rule.
    """

    never_after: ClassVar[Mapping[str, str]] = {
        "noisy_bias": "the bias was searched for the grid of inputs that are not smoothed",
        "activation_clip": "the clipping was searched for the grid of inputs that are not smoothed",
    }
    group_size: int = Field(128, ge=1)
    normalize_tokens: bool = True

    def check(self, scheme: Scheme) -> None:
        """Refuse float activations, and weights with more than one scale a row, whose groups the sorting would mix."""
        if scheme.activations is None:
            raise UsageError(
                "the pass `runtime_smooth` smooths activations that are quantized, and those of this scheme are not; "
                "leave it out, or take W4A8 or W4A4"
            )
        if scheme.weights.group_size:
            raise UsageError(
                f"the pass `runtime_smooth` sorts channels across the weights' groups of {scheme.weights.group_size}; "
                "give --group-size 0, one scale for each output channel"
            )

    def transforms_input(self, basis: Basis | None, columns: int) -> bool:
        """Return whether the linear's inputs make more than one group."""
        del basis
        return columns > self.group_size

    def input_transform(self, context: LinearContext) -> InputTransform:
        """Return the input transform with activations that are smoothed before they are quantized."""
        assert context.input_transform.activations is not None
        args = RuntimeSmoothArgs(group_size=self.group_size, normalize_tokens=self.normalize_tokens)
        return replace(
            context.input_transform,
            activations=context.input_transform.activations.model_copy(update={"runtime_smooth": args}),
        )
