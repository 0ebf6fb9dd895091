"""Each class's nearest other centers, as of the last refresh: negatives that are hard on purpose.

A refresh compares all centers with all, C^2 d multiplications over the ranks, a block of visiting
centers at a time. In between the lists age with the centers.
"""

from collections.abc import Iterator
from typing import Self

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor
from torch.distributed import ProcessGroup

from trainer.centers.optimizer import SparseOptimizer
from trainer.centers.parts import Part
from trainer.collectives import count_ranks, gather_counts, gather_rows
from trainer.config import CentersConfig
from trainer.evaluate.nearest import NOBODY, sort_keys, split_keys

_VISITING = 2**14  # centers that visit together
_QUERIES = 2048


class Neighbours:
    """Lists of nearest centers for the classes of one part."""

    def __init__(self, part: Part, length: int, device: torch.device) -> None:
        self._part = part
        self.lists = torch.full((len(part), length), -1, dtype=torch.int64, device=device)
        """(n, length) global classes, nearest first; -1: none yet."""

    @classmethod
    def build(cls, config: CentersConfig, part: Part, device: torch.device) -> Self | None:
        """Lists for a configuration that wants some."""
        return cls(part, config.hard_neighbours, device) if config.hard_share else None

    def of(self, positives: NDArray[np.int64], group: ProcessGroup | None) -> NDArray[np.int64]:
        """Distinct neighbours of these global classes: all nearest ones first. Collective."""
        part = self._part
        here = positives[(positives >= part.start) & (positives < part.stop)] - part.start
        lists = self.lists[torch.from_numpy(here).to(self.lists.device)]
        counts = gather_counts(len(lists), group, lists.device)
        by_rank = gather_rows(lists, counts, group).T.flatten().cpu().numpy()
        by_rank = by_rank[by_rank >= 0]
        _, first = np.unique(by_rank, return_index=True)
        return by_rank[np.sort(first)]

    def refresh(
        self, optimizer: SparseOptimizer, num_classes: int, group: ProcessGroup | None
    ) -> None:
        """Compare every class of this part with all centers as they are now. Collective."""
        optimizer.finish()
        length = min(self.lists.shape[1], num_classes - 1)
        best = torch.full((len(self._part), length), NOBODY, device=self.lists.device)
        for ids, units in _visit_centers(optimizer, num_classes, group):
            for start in range(0, len(best), _QUERIES):
                rows = slice(start, min(start + _QUERIES, len(best)))
                queries = _unit_rows(optimizer, rows)
                keys = sort_keys(queries @ units.T, ids)
                own = torch.arange(rows.start, rows.stop, device=ids.device) + self._part.start
                keys.masked_fill_(own.unsqueeze(1) == ids, NOBODY)
                together = torch.cat([best[rows], keys], dim=1)
                best[rows] = together.topk(length, dim=1).values
        self.lists.fill_(-1)
        self.lists[:, :length] = split_keys(best)[1]


def _visit_centers(
    optimizer: SparseOptimizer, num_classes: int, group: ProcessGroup | None
) -> Iterator[tuple[Tensor, Tensor]]:  # (k,) classes, (k, d)
    """Every rank's unit centers, a block at a time, with their global classes."""
    for rank in range(count_ranks(group)):
        part = Part.of_rank(num_classes, rank, count_ranks(group))
        for start in range(part.start, part.stop, _VISITING):
            stop = min(start + _VISITING, part.stop)
            if group is None or rank == dist.get_rank(group):
                units = _unit_rows(optimizer, slice(start - part.start, stop - part.start))
            else:
                units = optimizer.rows(slice(0, 0)).new_empty(stop - start, optimizer.dim)
            if group is not None:
                dist.broadcast(units, group=group, group_src=rank)
            yield torch.arange(start, stop, device=units.device), units


def _unit_rows(optimizer: SparseOptimizer, rows: slice) -> Tensor:
    return torch.nn.functional.normalize(optimizer.rows(rows), dim=1)
