"""The k largest values of every column over all ranks' rows, from the tiles of one sweep."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from trainer.similarity.pairs import Pairs, Tile


class TopK(NamedTuple):
    """Descending, -inf and row -1 where a column has fewer than k."""

    values: Tensor  # (N, k)
    rows: Tensor  # (N, k) int64 names of the rows


def measure_topk(
    pairs: Pairs,
    tiles: Iterable[Tile],  # one sweep of the pairs, excluded ones at -inf
    k: int,
    first_name: int,  # this rank's row r is named first_name + r; names of ranks do not overlap
) -> TopK:
    """The statistics pass and the merge: ranks exchange O(N k) numbers, no rows.

    Of equal values at the edge of the k, those of a tile before take precedence.
    """
    shape = (pairs.num_columns, k)
    values = torch.full(shape, -torch.inf, dtype=pairs.dtype, device=pairs.device)
    rows = torch.full(shape, -1, dtype=torch.int64, device=pairs.device)
    for tile in tiles:
        best, places = tile.values.topk(min(k, len(tile.values)), dim=0)
        names = places.T + (first_name + tile.rows.start)
        columns = tile.columns
        values[columns], rows[columns] = _largest(
            torch.cat([values[columns], best.T], 1), torch.cat([rows[columns], names], 1), k
        )
    # Names travel as float64 beside the values: exact up to 2^53 rows.
    share = torch.stack([values.double(), rows.double()], dim=-1)
    merged = pairs.merge_columns(share, _merge)
    values, rows = merged[..., 0].to(pairs.dtype), merged[..., 1].long()
    return TopK(values, rows.masked_fill_(values == -torch.inf, -1))


def _merge(shares: Tensor) -> Tensor:  # (W, n, k, 2) -> (n, k, 2)
    values, names = shares.transpose(0, 1).flatten(1, 2).unbind(-1)
    return torch.stack(_largest(values, names, shares.shape[2]), dim=-1)


def _largest(values: Tensor, names: Tensor, k: int) -> tuple[Tensor, Tensor]:  # (n, k), (n, k)
    ordered, places = values.sort(dim=1, descending=True, stable=True)
    return ordered[:, :k], names.gather(1, places[:, :k])
