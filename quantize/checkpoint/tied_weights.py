"""Parameters that go by several names are stored once as long as they stay equal."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class TiedWeights:
    """The tied parameters that were stored so far.

    Attributes:
        names: parameter → all names that it goes by.
        stored: the hash of each tied parameter that was stored as it is.
        left_out: the parameters that were not stored, each with the one that it equals.
        untied: whether some parameter no longer equals the one it was tied to.
    """

    names: Mapping[str, Sequence[str]]
    stored: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    untied: bool = False

    def deduplicate(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors to store as they are; one that still equals a tied tensor stored before is left out."""
        kept = dict(tensors)
        for name in filter(self._is_tied, tensors):
            digest = hashlib.sha256(tensors[name].contiguous().view(torch.uint8).numpy().data).hexdigest()
            others = [other for other in self.names[name] if other in self.stored]
            equal = next((other for other in others if self.stored[other] == digest), None)
            if equal is not None:
                del kept[name]
                self.left_out[name] = self.left_out.get(equal, equal)
            self.untied |= any(self.stored[other] != digest for other in others)
            self.stored[name] = digest
        return kept

    def mark_replaced(self, name: str) -> None:
        """Note that a parameter is stored as something else."""
        self.untied |= self._is_tied(name)

    def _is_tied(self, name: str) -> bool:
        return len(self.names.get(name, ())) > 1
