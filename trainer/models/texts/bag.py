"""A bag of hashed words: their mean vector, some residual layers, a projection to another size.

fastText's classifier (Joulin et al. 2016, arXiv 1607.01759) with an embedding in the place of its
softmax.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.dropout import KeyedTokenDropout

_WEIGHT_START = math.log(math.e - 1)  # whose softplus is 1


class BagTower(nn.Module):
    """(n, T) tokens, 0 where there is none -> (n, d); a text without tokens has mean 0."""

    def __init__(
        self,
        *,
        buckets: int,
        width: int,
        layers: int,
        embedding_dim: int,
        dropout: float,
        token_dropout: float,
        token_weights: bool,
    ) -> None:
        super().__init__()
        self.tokens = nn.EmbeddingBag(buckets, width, mode="sum")
        self.weights = nn.Embedding(buckets, 1) if token_weights else None
        self.token_dropout = KeyedTokenDropout(token_dropout)
        self.layers = nn.ModuleList(_Layer(width, dropout) for _ in range(layers))
        self.ln_final = nn.LayerNorm(width) if layers else nn.Identity()
        self.dropout = nn.Dropout(dropout)
        # A matrix between learns too fast at the rate that a table of rare words wants.
        square = width == embedding_dim and not layers
        self.proj = nn.Identity() if square else nn.Linear(width, embedding_dim, bias=False)
        nn.init.normal_(self.tokens.weight, std=width**-0.5)
        if self.weights is not None:
            nn.init.constant_(self.weights.weight, _WEIGHT_START)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self._mean(tokens)
        for layer in self.layers:
            x = layer(x)
        rows: Tensor = self.proj(self.dropout(self.ln_final(x)))
        return rows

    def _mean(self, tokens: Tensor) -> Tensor:  # (n, T) -> (n, width)
        kept = self.token_dropout(tokens != 0)
        counts = kept.sum(1)
        flat = tokens[kept]  # no work for padding, which is most of a short text's row
        starts = (counts.cumsum(0) - counts).to(flat.dtype)
        if self.weights is None:
            means: Tensor = self.tokens(flat, starts)
            return means / counts.clamp(min=1).unsqueeze(1).to(means.dtype)
        weights = F.softplus(self.weights(flat).squeeze(1))
        row_of = torch.repeat_interleave(counts)
        sums = weights.new_zeros(len(tokens)).index_add(0, row_of, weights)
        means = self.tokens(flat, starts, per_sample_weights=weights)
        return means / torch.where(counts > 0, sums, 1.0).unsqueeze(1)


class _Layer(nn.Module):
    """x + dropout(gelu(linear(norm(x))))."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.ln = nn.LayerNorm(width)
        self.linear = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:  # (n, width)
        added: Tensor = self.dropout(F.gelu(self.linear(self.ln(x))))
        return x + added
