"""An order of passes that is not legal is refused with a legal one."""

from __future__ import annotations

from collections.abc import Sequence

from quantize.errors import UsageError
from quantize.passes import Pass


def check_order(handlers: Sequence[Pass]) -> None:
    """Check that no pass comes after one that must not come before it.

    Raises:
        UsageError: one does; the message names the two, the reason and a legal order.
    """
    for i, handler in enumerate(handlers):
        for earlier in handlers[:i]:
            if why := handler.never_after.get(earlier.name):
                order = ", ".join(f"`{h.name}`" for h in legal_order(handlers))
                raise UsageError(
                    f"the pass `{handler.name}` must not come after `{earlier.name}`: {why}; a legal order is {order}"
                )


def legal_order(handlers: Sequence[Pass]) -> list[Pass]:
    """Return the passes in an order that none of them forbids, which is otherwise the given one."""
    left, ordered = list(handlers), []
    while left:
        first = next(h for h in left if not any(h.name in other.never_after for other in left))
        left.remove(first)
        ordered.append(first)
    return ordered
