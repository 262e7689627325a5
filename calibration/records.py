"""One record of calibration data becomes token ids: a text, a conversation, ids, or a row of tensors with a mask."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from quantize.calibration.data import beginning, first_ids
from quantize.checkpoint.tokenizer import Tokenize
from quantize.errors import UsageError, listed, shown

TEXT, IDS, MASK, MESSAGES = "text", "input_ids", "attention_mask", "messages"


def ids_of(record: Any, tokenize: Tokenize | None, source: str, count: int) -> list[int]:
    """Return the token ids of a record, without those that its mask leaves out; of a long text more than `count`.

    Args:
        record: a text; ids; or a mapping with `input_ids` and perhaps `attention_mask`, with `messages`, or with one
            text, which is that of `text` if there are several.
        tokenize: the model's tokenizer; None will do for ids.
        source: where the record comes from, for messages.
        count: the number of ids that are used.

    Raises:
        UsageError: the record is nothing of these, or needs a tokenizer that the model does not have.
    """
    if isinstance(record, str):
        return beginning(needed(tokenize, source), record, count)
    if isinstance(record, Mapping):
        if IDS in record:
            return unpadded(integers(record[IDS], source), record.get(MASK), source)
        if isinstance(messages := record.get(MESSAGES), Sequence) and not isinstance(messages, str):
            known = needed(tokenize, source)
            return first_ids(known, known.conversation(messages), count)
        text = text_of(record, source)
        return beginning(needed(tokenize, source), text, count)
    return integers(record, source)


def of_column(record: Any, column: str, source: str) -> Any:
    """Return a record of one of its columns alone, which holds a text or a list of messages.

    Raises:
        UsageError: the record has no such column, or something else is in it.
    """
    if not isinstance(record, Mapping) or column not in record:
        names = listed(record) if isinstance(record, Mapping) else "no columns"
        raise UsageError(f"{source} has rows of {names}; give one of these as --text-column, not {shown(column)}")
    value = record[column]
    if isinstance(value, str):
        return value
    if isinstance(value, Sequence) and value and isinstance(value[0], Mapping):
        return {MESSAGES: value}
    raise UsageError(f"{source} has {shown(value)} in the column {shown(column)}; name a column of texts or messages")


def text_of(record: Mapping[str, Any], source: str) -> str:
    """Return the text of a record.

    Raises:
        UsageError: it has none, or several and none of them is called `text`.
    """
    texts = {name: value for name, value in record.items() if isinstance(value, str)}
    if TEXT not in texts and len(texts) != 1:
        raise UsageError(
            f"{source} has rows of {listed(record) or 'nothing'}; call one of them text, messages or input_ids, or "
            "give --text-column"
        )
    return texts[TEXT] if TEXT in texts else next(iter(texts.values()))


def integers(values: Any, source: str) -> list[int]:
    """Return ids as a list.

    Raises:
        UsageError: they are no integers of one dimension.
    """
    found = values.tolist() if isinstance(values, Tensor) or hasattr(values, "tolist") else values
    if not isinstance(found, Sequence) or isinstance(found, str) or any(type(x) is not int for x in found):
        raise UsageError(f"{source} has {shown(found)} where a text or a list of token ids is expected")
    return list(found)


def unpadded(ids: list[int], mask: Any, source: str) -> list[int]:
    """Return the ids that the mask keeps, so that a padded token counts in no statistic.

    Raises:
        UsageError: the mask is not as long as the ids.
    """
    if mask is None:
        return ids
    kept = torch.as_tensor(mask).flatten().tolist()
    if len(kept) != len(ids):
        raise UsageError(
            f"{source} has an attention_mask of {len(kept)} for {len(ids)} token ids; give as many of both"
        )
    return [x for x, keep in zip(ids, kept, strict=True) if keep]


def needed(tokenize: Tokenize | None, source: str) -> Tokenize:
    """Return the tokenizer, or say why one is needed."""
    if tokenize is None:
        raise UsageError(f"{source} holds text, and the model has no tokenizer; give tokenizer=, or rows of input_ids")
    return tokenize
