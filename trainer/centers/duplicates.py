"""The closest pairs of centers: likely one person under two names."""

from collections.abc import Callable, Iterator
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from trainer.centers.files import StoredCenters

_TILE = 2048  # centers of each side that are compared at once


class Pair(NamedTuple):
    """Two classes, the first lower, and the cosine of their nearest centers."""

    cosine: float
    first: int
    second: int


def closest_pairs(
    stored: StoredCenters,
    top: int,
    *,
    threshold: float | None = None,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> tuple[list[Pair], int]:
    """The `top` pairs of largest cosine, and how many pairs reach `threshold` (None: all do).

    All C (C - 1) / 2 pairs are compared, C^2 d multiplications, with two blocks of centers and a
    tile of cosines in memory, whatever C.
    """
    best = _Best(top, threshold)
    compared, total = 0, stored.num_classes * (stored.num_classes + 1) // 2
    for left_start, left in _iter_units(stored, 0, device):
        others = _iter_units(stored, left_start + len(left), device)
        for right_start, right in chain([(left_start, left)], others):
            same = left_start == right_start
            for a in range(0, len(left), _TILE):
                for b in range(a if same else 0, len(right), _TILE):
                    tile = _cosines(left[a : a + _TILE], right[b : b + _TILE])
                    if same and a == b:
                        tile.masked_fill_(torch.ones_like(tile).tril_() > 0, -torch.inf)
                    best.add(tile, left_start + a, right_start + b)
            compared += len(left) * (len(left) + 1) // 2 if same else len(left) * len(right)
            if progress is not None:
                progress(stored.num_classes * compared // total, stored.num_classes)
    all_pairs = stored.num_classes * (stored.num_classes - 1) // 2
    return best.pairs(), all_pairs if threshold is None else best.count


class _Best:
    """The largest cosines so far."""

    def __init__(self, top: int, threshold: float | None) -> None:
        self._top, self._threshold = top, threshold
        self._cosines, self._pairs = torch.empty(0), torch.empty(0, 2, dtype=torch.int64)
        self.count = 0
        """Pairs that reach the threshold, where there is one."""

    def add(self, tile: Tensor, first_row: int, first_column: int) -> None:
        """Cosines of classes from `first_row` on with those from `first_column` on."""
        bar = -2.0
        if self._threshold is not None:
            bar = self._threshold
            self.count += int((tile >= bar).sum())
        if len(self._cosines) == self._top:
            bar = max(bar, float(self._cosines[-1]))
        if float(tile.max()) < bar:
            return
        over = int((tile >= bar).sum())
        values, places = tile.flatten().topk(min(self._top, over))
        rows = places // tile.shape[1] + first_row
        columns = places % tile.shape[1] + first_column
        cosines = torch.cat([self._cosines, values.cpu().float()])
        pairs = torch.cat([self._pairs, torch.stack([rows, columns], dim=1).cpu()])
        kept = cosines.topk(min(self._top, len(cosines))).indices  # falling
        self._cosines, self._pairs = cosines[kept], pairs[kept]

    def pairs(self) -> list[Pair]:
        """The closest first."""
        found = zip(self._cosines.tolist(), self._pairs.tolist(), strict=True)
        return sorted(
            (Pair(cosine, first, second) for cosine, (first, second) in found),
            key=lambda pair: (-pair.cosine, pair.first, pair.second),
        )


def _iter_units(
    stored: StoredCenters, start: int, device: torch.device | str
) -> Iterator[tuple[int, Tensor]]:  # (k, subcenters, d)
    """Unit centers from a class on, a block at a time."""
    for first, rows in stored.present(start=start):
        units = normalize(rows.to(device, torch.float32), dim=1)
        yield first, units.unflatten(0, (-1, stored.subcenters))


def _cosines(left: Tensor, right: Tensor) -> Tensor:  # (a, s, d), (b, s, d) -> (a, b)
    """Of the nearest centers of each two classes."""
    subcenters = left.shape[1]
    cosines = left.flatten(0, 1) @ right.flatten(0, 1).T
    if subcenters == 1:
        return cosines
    return cosines.view(len(left), subcenters, len(right), subcenters).amax((1, 3))
