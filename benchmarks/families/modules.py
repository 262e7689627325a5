"""Modules as people write them, with linears in other forms than `nn.Linear`; each takes token ids [batch, tokens]."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

VOCABULARY, WIDTH, HEADS, INNER = 128, 64, 4, 128


class Block(nn.Module):
    """A LayerNorm, what `make` returns, and a linear behind it, added to the residual stream."""

    def __init__(self, inner: nn.Module, width: int) -> None:
        super().__init__()
        self.norm, self.inner, self.last = nn.LayerNorm(WIDTH), inner, nn.Linear(width, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, tokens, WIDTH] → the same."""
        y: Tensor = x + self.last(functional.gelu(self.inner(self.norm(x))))
        return y


class Stack(nn.Module):
    """An embedding, two blocks, a LayerNorm and a head."""

    def __init__(self, block: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(block() for _ in range(2))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Token ids [batch, tokens] → logits [batch, tokens, VOCABULARY]."""
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits


class SelfAttention(nn.Module):
    """`nn.MultiheadAttention` of a sequence with itself."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, tokens, WIDTH] → the same."""
        y: Tensor = self.attention(x, x, x, need_weights=False)[0]
        return y


class MatrixParameter(nn.Module):
    """A product with a parameter that is stored as [in, out]."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, INNER) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        """[..., WIDTH] → [..., INNER]."""
        return x @ self.weight


class Einsum(nn.Module):
    """A product with a parameter [heads, in, out] that is written as an einsum."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(HEADS, WIDTH, WIDTH // HEADS) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, tokens, WIDTH] → the same."""
        return torch.einsum("btd,hde->bthe", x, self.weight).flatten(2)


class Pointwise(nn.Module):
    """A residual block of convolutions of one position."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up = nn.LayerNorm(WIDTH), nn.Conv1d(WIDTH, INNER, 1)
        self.down = nn.Conv1d(INNER, WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, tokens, WIDTH] → the same."""
        y: Tensor = x + self.down(functional.gelu(self.up(self.norm(x).mT))).mT
        return y


class Recurrent(nn.Module):
    """The states of a GRU."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(WIDTH, INNER, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, tokens, WIDTH] → [batch, tokens, INNER]."""
        y: Tensor = self.gru(x)[0]
        return y


class Squared(nn.Module):
    """`nn.Bilinear` of a sequence with itself."""

    def __init__(self) -> None:
        super().__init__()
        self.bilinear = nn.Bilinear(WIDTH, WIDTH, 16)

    def forward(self, x: Tensor) -> Tensor:
        """[..., WIDTH] → [..., 16]."""
        y: Tensor = self.bilinear(x, x)
        return y


class Adapted(nn.Module):
    """A linear with a low-rank adapter beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(WIDTH, INNER)
        self.down, self.up = nn.Linear(WIDTH, 4, bias=False), nn.Linear(4, INNER, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., WIDTH] → [..., INNER]."""
        y: Tensor = self.base(x) + 2 * self.up(self.down(x))
        return y


class Encoder(nn.Module):
    """`nn.TransformerEncoder` between an embedding and a head."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, INNER, batch_first=True)
        self.embed, self.head = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Token ids [batch, tokens] → logits [batch, tokens, VOCABULARY]."""
        logits: Tensor = self.head(self.encoder(self.embed(input_ids)))
        return logits


def stack(inner: Callable[[], nn.Module], width: int = INNER) -> Callable[[], nn.Module]:
    """Return what builds a model of two blocks around a module of `width` channels, with the same weights each time."""
    return seeded(lambda: Stack(lambda: Block(inner(), width)))


def seeded(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """Return what builds a model with the same random weights each time, in evaluation mode."""

    def built() -> nn.Module:
        torch.manual_seed(0)
        return make().eval()

    return built


def spectral() -> nn.Module:
    """Return a linear with spectral normalization."""
    return nn.utils.parametrizations.spectral_norm(nn.Linear(WIDTH, INNER))


MODULES: dict[str, Callable[[], nn.Module]] = {
    "nn.Linear": stack(lambda: nn.Linear(WIDTH, INNER)),
    "nn.MultiheadAttention": stack(SelfAttention, WIDTH),
    "nn.TransformerEncoder": seeded(Encoder),
    "weight_norm": stack(lambda: nn.utils.parametrizations.weight_norm(nn.Linear(WIDTH, INNER))),
    "spectral_norm": stack(spectral),
    "x @ W": stack(MatrixParameter),
    "einsum": stack(Einsum, WIDTH),
    "1x1 convolutions": seeded(lambda: Stack(Pointwise)),
    "nn.GRU": stack(Recurrent),
    "nn.Bilinear": stack(Squared, 16),
    "low-rank adapter": stack(Adapted),
}
