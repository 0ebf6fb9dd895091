"""All pairs of a gallery, counted by cosine: TAR at FARs that rest on more pairs than can be kept.

As in the MFR challenge (N images, N (N - 1) / 2 unordered pairs). Nothing is sampled: each pair is
counted once, in tiles, by the bin of its cosine.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.distributed import ProcessGroup

from data.errors import DataError
from trainer.collectives import gather_counts, own_rank, sum_over_ranks
from trainer.evaluate.nearest import visit_parts
from trainer.evaluate.roc import (
    Point,
    count_allowed,
    counts_of_a_curve,
    distinct,
    name_share,
)

Counts = NDArray[np.int64]

NUM_BINS = 1 << 18
"""Of the cosines in [-1, 1]: 7.7e-6 wide."""
TILE = 2048
GRAIN = 2.0**26
"""Coordinates are multiples of 1 / GRAIN. Their products are multiples of 2^-52 and no partial sum
of unit rows leaves [-2, 2], so float64 sums them without rounding: in any order, any tile, on any
device the cosine is the same number. What is rounded away moves a cosine by less than
sqrt(d) / GRAIN, 3.4e-7 at d = 512."""


def count_pairs(
    rows: Tensor,  # (n, d) unit rows, this rank's
    labels: Tensor,  # (n,) int64, below 0: unknown, left out
    group: ProcessGroup | None,
    *,
    tile: int = TILE,
) -> Tensor:  # (2, NUM_BINS) int64 pairs of one label, and of two, by cosine; equal on every rank
    """Every unordered pair once. Of two ranks' pairs each counts every other tile. Collective.

    Memory: two parts of the rows, a few tiles and the counts.
    """
    known = labels >= 0
    own = (rows[known].nan_to_num(nan=0.0), labels[known])
    me, number = own_rank(group), -1
    present = [r for r, n in enumerate(gather_counts(len(own[0]), group, rows.device)) if n]
    counts = torch.zeros((2, NUM_BINS), dtype=torch.int64, device=rows.device)
    for number, visitors in enumerate(visit_parts(own, group)):
        owner = present[number]
        first, second = (own, visitors) if me <= owner else (visitors, own)
        for a, b in _tiles(len(first[0]), len(second[0]), tile, same=owner == me):
            if owner != me and ((a.start + b.start) // tile % 2 == 0) != (me < owner):
                continue
            within = owner == me and a.start == b.start
            _count_tile(counts, _slice(first, a), _slice(second, b), within=within)
    return sum_over_ranks(counts, group)


def all_pairs(
    rows: Tensor,  # (n, d) unit rows, this rank's
    labels: Tensor,  # (n,) int64, below 0: unknown, left out
    group: ProcessGroup | None,
    *,
    fars: Sequence[float],
    tile: int = TILE,
) -> tuple[dict[str, float], list[Point]]:
    """`all_pairs_TAR@FAR=x` with the most that it may be too low, and the curve's points.

    The threshold is the lowest bin edge that keeps the FAR; between it and the next edge below,
    2 / NUM_BINS lower, lies the exact one, so the exact TAR is at most `..._error` higher. Equal at
    any world size and tile. Raises DataError without pairs of both kinds. Collective.
    """
    counts = count_pairs(rows, labels, group, tile=tile).cpu()
    totals = counts.sum(dim=1).tolist()
    if 0 in totals:
        raise DataError(
            f"all_pairs needs images of one label and of two, and there are {totals[0]} pairs of "
            f"one and {totals[1]} of two: is data.label_key the ending of the label member?"
        )
    accepted = counts.flip(1).cumsum(dim=1).numpy()
    numbers: dict[str, float] = {}
    resting: dict[str, float] = {}
    for far in fars:
        name, allowed = name_share(far), count_allowed(far, totals[1])
        point, error = _point(accepted, allowed)
        numbers[f"all_pairs_TAR@FAR={name}"] = point.tar
        numbers[f"all_pairs_TAR@FAR={name}_error"] = error
        resting[f"num_all_pairs_impostors@FAR={name}"] = allowed
    sizes = {"num_all_pairs_genuine": totals[0], "num_all_pairs_impostors": totals[1]}
    curve = [_point(accepted, count)[0] for count in counts_of_a_curve(totals[1])]
    return numbers | resting | sizes, distinct(curve)


def _tiles(
    num_rows: int, num_columns: int, tile: int, *, same: bool
) -> Iterator[tuple[slice, slice]]:
    """All tiles, or those on and above the diagonal."""
    for start in range(0, num_rows, tile):
        rows = slice(start, min(start + tile, num_rows))
        for column in range(start if same else 0, num_columns, tile):
            yield rows, slice(column, min(column + tile, num_columns))


def _slice(part: tuple[Tensor, ...], where: slice) -> tuple[Tensor, Tensor]:
    rows, labels = part
    return (rows[where].double() * GRAIN).round() / GRAIN, labels[where]


def _count_tile(
    counts: Tensor, ours: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor], *, within: bool
) -> None:
    cosines = (ours[0] @ theirs[0].T).clamp_(-1, 1)
    bins = cosines.add_(1).mul_(NUM_BINS / 2).long().clamp_(max=NUM_BINS - 1)
    genuine = ours[1][:, None] == theirs[1]
    kept = bins.new_ones(bins.shape, dtype=torch.bool).triu_(1) if within else None
    if kept is not None:
        genuine &= kept
    in_all = (bins if kept is None else bins[kept]).flatten().bincount(minlength=NUM_BINS)
    of_genuine = bins[genuine].bincount(minlength=NUM_BINS)
    counts[0] += of_genuine
    counts[1] += in_all - of_genuine


def _point(
    accepted: Counts,  # (2, NUM_BINS) pairs at or above the lower edge of bin -1 - i
    allowed: int,
) -> tuple[Point, float]:
    """The lowest edge with so few impostors, and how much more TAR the next one below has."""
    totals = accepted[:, -1].tolist()
    taken = int(np.searchsorted(accepted[1], allowed, side="right"))  # bins, from the top
    genuine, impostors = accepted[:, taken - 1].tolist() if taken else (0, 0)
    more = int(accepted[0, min(taken, NUM_BINS - 1)])
    tar = genuine / totals[0]
    edge = 1 - taken * 2 / NUM_BINS
    return Point(impostors / totals[1], tar, edge, allowed), more / totals[0] - tar
