"""Single pairs among the tiles: which places of a tile are on a list, such as a query's labels."""

import torch
from torch import Tensor

from trainer.similarity.pairs import Pairs, Tile


class PairList:
    """Pairs at p places, in an order that makes those of any tile one span.

    The list is sorted once, O(p log p); no table of all pairs exists.
    """

    def __init__(
        self,
        pairs: Pairs,
        rows: Tensor,  # (p,) int64 among this rank's stationary rows
        columns: Tensor,  # (p,) int64 among all N visiting rows; no place twice
    ) -> None:
        self._side, self._num_columns = pairs.tile, pairs.num_columns
        keys, self.order = (rows // self._side * self._num_columns + columns).sort()
        """(p,) where each pair of the list stood before."""
        self.rows, self.columns = rows[self.order], columns[self.order]
        self._keys = keys.cpu()  # asked for a span a tile: a GPU would be waited for

    def __len__(self) -> int:
        return len(self.rows)

    def at(self, tile: Tile) -> tuple[slice, tuple[Tensor, Tensor]]:
        """The tile's span of the list, and the places of its pairs in an (m, k) table."""
        before = tile.rows.start // self._side * self._num_columns
        ends = torch.tensor([before + tile.columns.start, before + tile.columns.stop])
        span = slice(*torch.searchsorted(self._keys, ends).tolist())
        rows, columns = self.rows[span] - tile.rows.start, self.columns[span] - tile.columns.start
        return span, (rows, columns)
