"""Made-up embeddings with identities, and their deal over ranks: runs of samples, also none."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

DEALS = [[0, 1], [0, 0.4, 1], [0, 0, 0.9, 1], [0, 0.3, 0.5, 1]]
"""Bounds of the ranks' runs, as shares of the samples."""


class Dealt(NamedTuple):
    """Samples of all ranks, or of one."""

    rows: Tensor  # (n, d) unit rows
    ids: Tensor  # (n,) rising, with gaps
    labels: Tensor  # (n,)

    def part(self, bounds: list[float], rank: int) -> "Dealt":
        """What rank `rank` holds."""
        first, last = (round(share * len(self.ids)) for share in bounds[rank : rank + 2])
        return Dealt(*(column[first:last] for column in self))


def labelled_rows(
    count: int, num_labels: int, *, dim: int = 8, seed: int = 0, noise: float = 0.7
) -> Dealt:
    """Rows around one direction a label; a few repeat exactly, a few labels are unknown."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, num_labels, (count,), generator=generator)
    directions = F.normalize(torch.randn(num_labels, dim, generator=generator), dim=1)
    rows = directions[labels] + noise * torch.randn(count, dim, generator=generator) / dim**0.5
    rows[count // 2 : count // 2 + 4] = rows[:4]
    labels[count // 2] = -1
    ids = torch.randperm(10 * count, generator=generator)[:count].sort().values
    return Dealt(F.normalize(rows, dim=1), ids, labels)
