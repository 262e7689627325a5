"""A loaded model that runs as if its prefix stood in front of every sequence."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers.utils import ModelOutput

from quantize.errors import UsageError
from quantize.nn.prefix_tokens import PrefixTokens
from quantize.nn.quantized_linear import QuantizedLinear

CACHES = ("cache", "past_key_values")  # transformers' name for it, and its former name
MISSING = "prefix_tokens_in_front"  # of a cache: how many tokens stand in front of those that the caller gave
NOT_SCORED = -100  # a label that is not scored


def attach(model: nn.Module, tokens: Sequence[int]) -> None:
    """Let a causal language model of transformers run with a prefix, its activations in floating point.

    A call returns what it would return with the prefix in front, for the given tokens only; so does `generate`. Tokens
    that all sequences begin with and the prefix ends with are taken for the prefix's own (`PrefixTokens.missing`).
    Attention weights are returned as they are, and parts of the model (its body without the head) run without prefix.
    """
    prefixed = PrefixHooks(PrefixTokens(tuple(tokens), absent=True))
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            module.leading = prefixed.leading
    model.register_forward_pre_hook(prefixed.pre_forward, with_kwargs=True)
    model.register_forward_hook(prefixed.post_forward, always_call=True)


def detach(model: nn.Module) -> int:
    """Take the prefix off a model in place, for callers whose cache holds it already; return its length, 0 for none."""
    found = 0
    for hooks in (model._forward_pre_hooks, model._forward_hooks):
        for key, hook in list(hooks.items()):
            if isinstance(owner := getattr(hook, "__self__", None), PrefixHooks):
                found = len(owner.leading.tokens)
                del hooks[key]
    return found


@dataclass
class PrefixHooks:
    """Hooks around `forward`, which copies of the model take along.

    If a KV cache holds the prefix already, only the mask and the positions are moved.

    Attributes:
        leading: the prefix tokens, shared with all quantized linears of the model.
        missing: the number of tokens that stand in front of the caller's in the forward pass that runs.
        keep: the number of logits that the caller asked for, while the head must see all rows.
    """

    leading: PrefixTokens
    missing: int = 0
    keep: int = 0

    def pre_forward(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        """Put the prefix in front.

        Raises:
            UsageError: the inputs are no token ids, or the mask does not fit them.
        """
        kwargs = dict(zip(inspect.signature(module.forward).parameters, args, strict=False)) | kwargs
        ids = kwargs.get("input_ids")
        if ids is None:
            raise UsageError("the model has a prefix of tokens and takes input_ids alone; give these")
        if isinstance(kwargs.get("logits_to_keep"), Tensor):
            raise UsageError("a model with a prefix takes logits_to_keep as a number; give that, and choose afterwards")
        cache = next((kwargs[name] for name in CACHES if kwargs.get(name) is not None), None)
        held = 0 if cache is None else int(cache.get_seq_length())
        m = getattr(cache, MISSING, len(self.leading.tokens)) if held else self.leading.missing(ids)
        check_mask(kwargs.get("attention_mask"), ids.shape[1], max(0, held - m))
        check_positions(kwargs.get("position_ids"), held, m)
        self.missing, self.leading.absent, self.leading.shape = m, held > 0, (len(ids), m + ids.shape[1])
        if isinstance(head_of(module), QuantizedLinear):  # all its rows, to know which are the prefix
            self.keep = int(kwargs.pop("logits_to_keep", 0))
        moves = HELD if held else HELD | FRONT | {"input_ids": lambda ids, _: self.leading.prepended(ids)}
        return (), kwargs | {
            name: move(kwargs[name], m) for name, move in moves.items() if kwargs.get(name) is not None
        }

    def post_forward(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Remove the prefix from what is returned."""
        del module, args
        if not self.leading.absent and self.leading.shape is not None:
            output = last(output, self.leading.shape[1] - self.missing)
            for cache in caches(output):
                setattr(cache, MISSING, self.missing)
        if self.keep:
            output.logits = output.logits[:, -self.keep :]
        self.leading.absent, self.keep = True, 0
        return output


def caches(output: Any) -> list[Any]:
    """Return the KV caches among what a model returned."""
    values = output.values() if isinstance(output, ModelOutput) else output if isinstance(output, tuple) else ()
    return [value for value in values if hasattr(value, "get_seq_length")]


def check_mask(mask: Any, tokens: int, held: int) -> None:
    """Check that a mask covers the tokens of the cache and those given.

    Raises:
        UsageError: the mask has another shape.
    """
    if isinstance(mask, Tensor) and (mask.dim() != 2 or mask.shape[1] != held + tokens):
        raise UsageError(
            f"the attention_mask has the shape {list(mask.shape)} for {tokens} tokens behind {held} in the cache; give "
            f"[batch, {held + tokens}], without the prefix, and `generate` no cache of an earlier call"
        )


def check_positions(positions: Any, held: int, p: int) -> None:
    """Check that tokens after a cache follow it directly; `generate` would take the prefix in an old cache for text.

    Raises:
        UsageError: they do not.
    """
    if held and isinstance(positions, Tensor) and int(positions[..., 0].max()) > held - p:
        raise UsageError(
            f"the tokens begin at position {int(positions[..., 0].max())} behind {held - p} in the cache; a model with "
            "a prefix continues where they end, so give `generate` no cache of an earlier call"
        )


def head_of(model: nn.Module) -> Any:
    """Return the module that scores the vocabulary, if the model names one."""
    return getattr(model, "get_output_embeddings", lambda: None)()


def last(output: Any, tokens: int) -> Any:
    """Return what a model returned, cut to the last so many tokens."""
    if isinstance(output, Tensor):
        return output[:, -tokens:] if output.dim() == 3 else output
    if isinstance(output, ModelOutput):
        for name, value in output.items():
            output[name] = last(value, tokens)
        return output
    return tuple(last(value, tokens) for value in output) if isinstance(output, tuple) else output


def positions_in_front(positions: Tensor, p: int) -> Tensor:
    """Put the positions of the prefix in front: [..., T] → [..., p + T]."""
    first = torch.arange(p, device=positions.device).expand(*positions.shape[:-1], p)
    return torch.cat([first, positions + p], dim=-1)


def labels_in_front(labels: Tensor, p: int) -> Tensor:
    """Put ignored labels in front: [B, T] → [B, p + T]; the first token given is not scored, as without a prefix."""
    return pad(labels[:, 1:], (p + 1, 0), value=NOT_SCORED)


Move = Callable[[Tensor, int], Tensor]
HELD: dict[str, Move] = {
    "attention_mask": lambda mask, p: pad(mask, (p, 0), value=1),
    "position_ids": lambda positions, p: positions + p,
}
FRONT: dict[str, Move] = {"position_ids": positions_in_front, "labels": labels_in_front}
