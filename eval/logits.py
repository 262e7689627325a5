"""The logits of a language model, a few tokens at a time, so that a large vocabulary does not fill the memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from quantize.graph.export import forward_switches
from quantize.nn.quantized_linear import QuantizedLinear

LOGIT_BYTES = 1 << 26  # of the logits of one model that are made at once, in float32


def tokens_at_once(model: nn.Module, rows: int) -> int:
    """Return how many tokens of each of so many windows have logits of `LOGIT_BYTES` together, at least one."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return max(1, LOGIT_BYTES // (4 * rows * int(getattr(head, "out_features", 1))))


def logits_in_chunks(model: nn.Module, ids: Tensor, count: int) -> Iterator[Tensor]:
    """Yield logits float32 [B, count, V] of all but the last of the token ids [B, T], `count` of a window at a time.

    The body of the model runs once. The rest of its `forward`, which may scale or cap what the head returns, then runs
    on a few tokens of the body's output after the others. A model without such a body makes all logits at once.
    """
    body = model.base_model if isinstance(model, PreTrainedModel) else model
    hidden: list[Any] = []

    def keep(_: nn.Module, __: Any, output: Any) -> Any:
        """Keep the body's output, and hand the last token alone to the head, which has no prefix in front then."""
        head = model.get_output_embeddings()  # type: ignore[operator]
        if isinstance(head, QuantizedLinear):
            head.leading.absent = True
        hidden.append(output)
        return part_of(output, slice(-1, None))

    hook = body.register_forward_hook(keep) if body is not model else None
    try:
        logits = model(input_ids=ids, **(forward_switches(model) if hook else {})).logits
    finally:
        if hook:
            hook.remove()
    if not hidden or logits.shape[1] > 1:
        yield from (chunk.float() for chunk in logits[:, :-1].split(count, 1))
        return
    (output,) = hidden
    output = part_of(output, slice(-ids.shape[1], -1))
    for start in range(0, ids.shape[1] - 1, count):
        yield head_logits(model, body, part_of(output, slice(start, start + count)), ids).float()


def part_of(output: Any, tokens: slice) -> Any:
    """Return what a body returned for some of the tokens."""
    return dataclasses.replace(output, last_hidden_state=output.last_hidden_state[:, tokens])


def head_logits(model: nn.Module, body: nn.Module, output: Any, ids: Tensor) -> Tensor:
    """Return the logits of a model whose body returns `output`."""
    body.forward = lambda *_, **__: output
    try:
        logits: Tensor = model.forward(input_ids=ids, **forward_switches(model)).logits  # without hooks of a prefix
        return logits
    finally:
        del body.forward
