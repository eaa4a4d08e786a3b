"""The language models of the examples, from stock torch.nn layers or from ours.

Tokens [B, T] in, through an embedding that is learned from scratch, a recurrence or two blocks of
causal self-attention, and an output row for each token of the vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from text import PAD
from torch import Tensor, nn

import pykernels.nn

LAYERS = {"stock": torch.nn, "ours": pykernels.nn}
KINDS = ("rnn", "gru", "lstm", "transformer")


class LanguageModel(nn.Module):
    """Calling it gives the loss; `logits` scores each next token, `states` are the vectors before.

    Args:
        layers: "stock" or "ours"; the same seed gives both the same weights.
        kind: one of `KINDS`.
        rows: V, the size of the vocabulary.
        width: H, of the embedding and of all that follows.
        tied: the output reads the embedding's matrix instead of one of its own.
    """

    def __init__(
        self, layers: str, kind: str, rows: int, width: int, *, tied: bool = False
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(rows, width, padding_idx=PAD)
        if kind == "transformer":
            self.body = Transformer(layers, width)
        else:
            self.body = getattr(LAYERS[layers], kind.upper())(width, width, batch_first=True)
        head = pykernels.nn.LinearCrossEntropyLoss if layers == "ours" else LinearThenLoss
        self.head = head(width, rows, bias=True)
        if tied:
            # As small as an output row is drawn, or the first scores would be far too sure.
            nn.init.normal_(self.embed.weight, std=width**-0.5)
            self.head.weight = self.embed.weight

    def states(self, tokens: Tensor) -> Tensor:
        """[B, T, H]: what the model makes of each token and those before it."""
        x = self.body(self.embed(tokens))
        return x[0] if isinstance(x, tuple) else x

    def logits(self, tokens: Tensor) -> Tensor:
        """[B, T, V]: the scores of each next token."""
        return self.head.logits(self.states(tokens))

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """The mean loss of the targets [B, T] that are not ignored, in nats."""
        return self.head(self.states(tokens), targets)


class LinearThenLoss(nn.Linear):
    """The stock way to a loss, through the scores [B, T, V]."""

    def logits(self, x: Tensor) -> Tensor:
        return super().forward(x)

    def forward(self, x: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(self.logits(x).flatten(0, 1), targets.flatten())


class Transformer(nn.Module):
    """x [B, T, H] through two blocks of causal self-attention, of which the first looks near.

    Where a word stands is told by distances alone: a score falls by the slope of its block with
    every step back (O. Press et al., "Train short, test long: attention with linear biases enables
    input length extrapolation", 2022). From sines that are added to the words so small a model
    would not learn, in some hundred steps, even which word comes just before.
    """

    SLOPES = (1 / 2, 1 / 64)

    def __init__(self, layers: str, width: int, heads: int = 4) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(layers, width, heads) for _ in self.SLOPES)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        back = torch.arange(x.shape[1])[:, None] - torch.arange(x.shape[1])  # steps, [T, T]
        for block, slope in zip(self.blocks, self.SLOPES, strict=True):
            x = block(x, torch.where(back < 0, -torch.inf, -slope * back).to(x))
        return self.norm(x)


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x)); x is [B, T, H]."""

    def __init__(self, layers: str, width: int, heads: int) -> None:
        super().__init__()
        self.before = nn.LayerNorm(width)
        self.attention = LAYERS[layers].MultiheadAttention(width, heads, batch_first=True)
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        n = self.before(x)
        x = x + self.attention(n, n, n, attn_mask=bias, need_weights=False)[0]
        return x + self.feed_forward(x)
