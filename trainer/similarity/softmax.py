"""Softmax over rows and over columns of the same logits, from the same tiles."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.similarity.pairs import Pairs, Tile
from trainer.similarity.statistics import add_logsumexp


@dataclass(frozen=True)
class TwoWaySoftmax:
    """Normalisers of this rank's rows (n,) and of all columns (N,).

    Where no logit can leave the range of exp, they are plain sums of exp(logit), and one
    exponential a pair serves both directions. Else (float32 above a scale of about 75) they are
    log-sum-exps, and each direction has an exponential of its own below its own maximum.
    """

    rows: Tensor
    columns: Tensor
    plain: bool

    def logsumexps(self) -> tuple[Tensor, Tensor]:  # (n,), (N,)
        """The logarithms of both normalisers."""
        return (self.rows.log(), self.columns.log()) if self.plain else (self.rows, self.columns)

    def probabilities(self, tile: Tile) -> Tensor:  # (m, k)
        """Row softmax plus column softmax; uses up the tile's memory."""
        rows, columns = self.rows[tile.rows].unsqueeze(1), self.columns[tile.columns]
        if self.plain:
            factors = torch.add(1 / rows, 1 / columns, out=tile.scratch)
            return tile.values.exp_().mul_(factors)
        by_row = torch.sub(tile.values, rows, out=tile.scratch).exp_()
        return by_row.add_(tile.values.sub_(columns).exp_())


def measure_softmax(
    pairs: Pairs,
    tiles: Iterable[Tile],  # one sweep of the pairs, excluded ones at -inf
) -> TwoWaySoftmax:
    """The statistics pass of both directions."""
    range_of_exp = math.log(torch.finfo(pairs.dtype).max) - 1
    plain = pairs.bound() + math.log(max(pairs.num_columns, 1)) < range_of_exp
    none = 0.0 if plain else -torch.inf
    rows, columns = pairs.new_rows(none), pairs.new_columns(none)
    for tile in tiles:
        if plain:
            powers = torch.exp(tile.values, out=tile.scratch)
            rows[tile.rows] += powers.sum(1)
            columns[tile.columns] += powers.sum(0)
        else:
            add_logsumexp(rows[tile.rows], tile.values, 1, tile.scratch)
            add_logsumexp(columns[tile.columns], tile.values, 0, tile.scratch)
    columns = pairs.merge_columns(columns, _sum_ranks if plain else _logsumexp_ranks)
    return TwoWaySoftmax(rows, columns, plain)


def _sum_ranks(shares: Tensor) -> Tensor:  # (W, n) -> (n,)
    return shares.sum(0)


def _logsumexp_ranks(shares: Tensor) -> Tensor:  # (W, n) -> (n,)
    return shares.logsumexp(0)
