"""A small mixture of experts whose graph has all that the analysis of experts looks for, under names of its own."""

import torch
from torch import Tensor, nn

from quantize.checkpoint.meta_model import build_skeleton  # noqa: F401  (transformers registers its products)


class Mixture(nn.Module):
    """Tokens go to two of four experts, whose weights are stacks; a convolution is a stack of another kind."""

    def __init__(self, vocabulary: int = 32, width: int = 16, inner: int = 24, experts: int = 4) -> None:
        super().__init__()
        self.words = nn.Embedding(vocabulary, width)
        self.mix = nn.Conv1d(width, width, 3, padding=1)
        self.chooser = nn.Linear(width, experts, bias=False)
        self.rise = nn.Parameter(torch.randn(experts, inner, width) / 4)
        self.fall = nn.Parameter(torch.randn(experts, inner, width) / 4)
        self.score = nn.Linear(width, vocabulary, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        """[B, T] → [B, T, vocabulary]."""
        x = self.words(input_ids)
        x = x + self.mix(x.transpose(1, 2)).transpose(1, 2)
        return self.score(x + self.experts(x.flatten(0, 1)).view_as(x))

    def experts(self, x: Tensor) -> Tensor:
        weights, chosen = self.chooser(x).softmax(-1).topk(2, dim=-1)
        numbers, order = chosen.flatten().sort()
        counts = torch.nn.functional.one_hot(numbers, len(self.rise)).sum(0)
        offs = counts.cumsum(0, dtype=torch.int32)
        product = torch.ops.transformers.grouped_mm_fallback
        inner = product(x[order // 2], self.rise.transpose(-2, -1), offs=offs).relu()
        y = product(inner, self.fall, offs=offs) * weights.flatten()[order][:, None]
        return torch.zeros_like(x).index_add(0, order // 2, y)
