"""TextModel: texts and labels as the trainer embeds them, from tokens to unit rows.

One tower embeds both, or each has its own. `log_scale` and `bias` belong to the loss and have shape
[1], because a parameter without a dimension crashes DeepSpeed.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.augment import ResizeMode
from data.text import TokenizerSpec
from trainer.dropout import RowKeys, use_row_keys

SHARED, QUERIES, LABELS = "texts", "queries", "labels"  # names of towers


class TextEmbeddings(NamedTuple):
    """What a loss needs of a batch; a tuple, so that DeepSpeed's hooks see its tensors."""

    queries: Tensor | None
    """(n, d) float32 unit rows, or None where no queries were given."""
    labels: Tensor | None
    """(m, d) float32 unit rows, or None where no label texts were given."""
    scale: Tensor
    """(1,) multiplier of the cosines: exp(log_scale)."""
    bias: Tensor | None
    """(1,) additive term of one_vs_all; None for other losses."""

    def detach(self) -> "TextEmbeddings":
        """The same values, cut from the graph."""
        queries, labels, bias = (
            None if tensor is None else tensor.detach()
            for tensor in (self.queries, self.labels, self.bias)
        )
        return TextEmbeddings(queries, labels, self.scale.detach(), bias)


class TextModel(nn.Module):
    """Towers by name ("texts" for both, or "queries" and "labels"), with scale and bias."""

    log_scale: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        towers: Mapping[str, nn.Module],  # each (n, T) int64 tokens -> (n, d)
        *,
        tokenizer_spec: TokenizerSpec,
        embed_dim: int,
        scale: float,
        bias: float | None,
        max_scale: float,
    ) -> None:
        super().__init__()
        self.towers = nn.ModuleDict(towers)
        self.log_scale = nn.Parameter(torch.tensor([math.log(scale)]))
        self.bias = None if bias is None else nn.Parameter(torch.tensor([bias]))
        self.tokenizer_spec = tokenizer_spec
        self.embed_dim = embed_dim
        self.max_scale = max_scale
        self.query_keys = RowKeys()

    @property
    def image_size(self) -> tuple[int, int]:
        """There are no images."""
        return 0, 0

    @property
    def resize_mode(self) -> ResizeMode:
        """There are no images."""
        return "squash"

    def forward(
        self,
        queries: Tensor | None = None,  # (n, T) tokens
        labels: Tensor | None = None,  # (m, T) tokens
        label_keys: Tensor | None = None,  # (m,) keys of dropout, as `use_row_keys` has queries'
    ) -> TextEmbeddings:
        """Embed either or both sides, either of which may have no rows.

        A shared tower is passed once by all rows: one gradient of its table, not two.
        """
        if queries is not None and labels is not None and SHARED in self.towers:
            self._use_keys(SHARED, queries, label_keys)
            rows = self._embed(SHARED, torch.cat([queries, labels]))
            sides = rows.split([len(queries), len(labels)])
            return TextEmbeddings(sides[0], sides[1], self.log_scale.exp(), self.bias)
        query_rows = label_rows = None
        if queries is not None:
            query_rows = self._embed(self._name(QUERIES), queries)
        if labels is not None:
            self._use_keys(self._name(LABELS), None, label_keys)
            label_rows = self._embed(self._name(LABELS), labels)
        return TextEmbeddings(query_rows, label_rows, self.log_scale.exp(), self.bias)

    def _name(self, side: str) -> str:
        return side if side in self.towers else SHARED

    def _use_keys(self, name: str, queries: Tensor | None, label_keys: Tensor | None) -> None:
        """Tell a tower's dropout which rows come: queries, whose keys were given, then labels."""
        if not self.training or label_keys is None:
            return
        if queries is not None:
            label_keys = torch.cat([self.query_keys.keys_of(len(queries)), label_keys])
        use_row_keys(self.towers[name], label_keys)

    def _embed(self, name: str, tokens: Tensor) -> Tensor:  # (n, T) -> (n, d) unit
        rows: Tensor = self.towers[name](tokens)
        rows = rows if rows.dtype == torch.float64 else rows.float()
        return F.normalize(rows, dim=-1)

    @property
    def log_scale_limits(self) -> tuple[float, float]:
        """Limits of `log_scale` after a step; infinite both ways when `max_scale` is `inf`."""
        if math.isinf(self.max_scale):
            return -math.inf, math.inf
        return 0.0, math.log(self.max_scale)
