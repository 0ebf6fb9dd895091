"""A small transformer over hashed words: pre-norm, learned positions, the mean over real tokens.

Blocks are timm's.
"""

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from trainer.models.recompute import recomputed

STD = 0.02


class TransformerTower(nn.Module):
    """(n, T) tokens, 0 where there is none -> (n, d); padding is neither attended to nor pooled.

    Columns that no text of a call reaches are not computed. A text without tokens has mean 0.
    """

    def __init__(
        self,
        *,
        buckets: int,
        width: int,
        layers: int,
        heads: int,
        context_length: int,
        embedding_dim: int,
        dropout: float,
        drop_path: float,
    ) -> None:
        super().__init__()
        self.grad_checkpointing = False
        self.tokens = nn.Embedding(buckets, width)
        self.positions = nn.Parameter(torch.empty(context_length, width))
        self.blocks = nn.ModuleList(
            Block(
                width,
                heads,
                qkv_bias=True,
                proj_drop=dropout,
                drop_path=drop_path * i / max(1, layers - 1),
                norm_layer=nn.LayerNorm,
            )
            for i in range(layers)
        )
        self.ln_final = nn.LayerNorm(width)
        self.proj = nn.Linear(width, embedding_dim, bias=False)
        nn.init.normal_(self.tokens.weight, std=STD)
        nn.init.normal_(self.positions, std=STD / 2)

    def forward(self, tokens: Tensor) -> Tensor:
        present = tokens != 0
        columns = present.any(0).nonzero()
        longest = int(columns[-1]) + 1 if len(columns) else 1
        tokens, present = tokens[:, :longest], present[:, :longest]
        x = self.tokens(tokens) + self.positions[:longest]
        # A text without tokens attends to its padding: a softmax over nothing is not a number.
        seen = (present | ~present.any(1, keepdim=True))[:, None, None, :]
        for block in self.blocks:
            x = recomputed(block, x, seen) if self._recomputes() else block(x, seen)
        x = self.ln_final(x) * present.unsqueeze(2)
        means = x.sum(1) / present.sum(1).clamp(min=1).unsqueeze(1).to(x.dtype)
        rows: Tensor = self.proj(means)
        return rows

    def set_grad_checkpointing(self) -> None:
        """Keep only the input of each block for the backward pass."""
        self.grad_checkpointing = True

    def _recomputes(self) -> bool:
        return self.grad_checkpointing and self.training and torch.is_grad_enabled()
