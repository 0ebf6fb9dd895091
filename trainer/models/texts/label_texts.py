"""Texts of labels as tokens, made once and kept in memory, and as embeddings."""

import logging
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from data.label_table import LabelTable
from data.text import TokenizerSpec, build_tokenizer
from trainer.models.texts.model import TextModel

_AT_ONCE = 8192  # texts tokenised together, which takes eight bytes a token

logger = logging.getLogger("nsphere.train")


@dataclass(frozen=True)
class LabelTokens:
    """Tokens of labels [start, start + k)."""

    start: int
    rows: Tensor  # (k, T) int32

    def of(self, labels: Tensor) -> Tensor:  # (m,) int64 global ids -> (m, T) int32
        """Tokens of some labels, which must be among them."""
        return self.rows[labels - self.start]


def tokenize_labels(table: LabelTable, spec: TokenizerSpec, start: int, stop: int) -> LabelTokens:
    """Tokens of labels [start, stop) of the table: 4 T bytes a label."""
    tokenizer = build_tokenizer(spec)
    rows = torch.empty(stop - start, spec.context_length, dtype=torch.int32)
    for first in range(start, stop, _AT_ONCE):
        end = min(first + _AT_ONCE, stop)
        rows[first - start : end - start] = tokenizer(table.texts_of(np.arange(first, end)))
    logger.info("texts of %d labels: %.1f MB of tokens", len(rows), rows.nbytes / 1e6)
    return LabelTokens(start, rows)


@torch.no_grad()
def embed_labels(model: TextModel, tokens: LabelTokens, batch_size: int = 1024) -> Tensor:
    """(k, d) unit rows of a model that is whole on this rank and in evaluation mode."""
    device = model.log_scale.device
    parts = [torch.zeros(0, model.embed_dim, device=device)]
    for rows in tokens.rows.split(batch_size) if len(tokens.rows) else ():
        parts.append(model(None, rows.to(device)).labels)
    return torch.cat(parts)
