"""What losses over labels share: this rank's embeddings against those of all ranks."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from trainer.losses.checks import check_per_row, check_rows
from trainer.similarity.exclusion import Exclusion
from trainer.similarity.pairs import Pairs, Tile


@dataclass(frozen=True)
class Labelled:
    """Pairs of this rank's embeddings with those of all ranks; their values are the logits."""

    embeddings: Tensor
    """(n, d) in the dtype of computation, float32 or better."""
    labels: Tensor
    """(N,) of all ranks."""
    scale: float
    pairs: Pairs
    exclusion: Exclusion

    @property
    def share(self) -> float:
        """W/N: what turns a sum over this rank's rows into its term of the mean over ranks."""
        return self.pairs.world_size / max(self.pairs.num_columns, 1)

    def positives(self, tile: Tile) -> Tensor:  # (m, k) bool
        """Pairs of one class; a row with itself or its duplicates is no pair: -inf in the tile."""
        self.exclusion.exclude(tile)
        tile.own_pairs(tile.values).fill_(-torch.inf)
        labels = self.labels[self.pairs.own_columns(tile.rows)]
        equal = labels.unsqueeze(1) == self.labels[tile.columns]
        return equal.logical_and_(tile.values != -torch.inf)


def label(
    embeddings: Tensor,  # (n, d)
    labels: Tensor,  # (n,) int
    scale: float,
    group: ProcessGroup | None,
    *,
    ids: Tensor | None,  # (n,) int
    visiting: str,
    tile: int | None,
) -> Labelled:
    """Check the inputs, bring them to the dtype of computation and gather what is needed."""
    check_rows(embeddings=embeddings)
    check_per_row("labels", labels, embeddings)
    check_per_row("ids", ids, embeddings)
    dtype = torch.promote_types(embeddings.dtype, torch.float32)
    rows = embeddings.to(dtype)
    pairs = Pairs(rows, embeddings, group, factor=scale, visiting=visiting, tile=tile)
    return Labelled(rows, pairs.gather(labels), scale, pairs, Exclusion(pairs, [ids]))
