"""Clusters -> batches: which cluster goes into which batch, and what becomes of the rest.

Places 0 to n of a plan are cut into batches at `BatchShape.edges`. Clusters are shuffled and laid
into batches whole; loose rows (drawn at random, unseen) fill what is left, spread evenly. Where
whole clusters cannot fill the batches (their size divides none), as few as possible are torn: their
rows stay together in the gaps of consecutive batches. So every row has one place, whatever fits.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data.negatives.tree import Clusters
from data.order import derive_key, mix_bits

Int64s = NDArray[np.int64]

SHUFFLE_ROWS, SHUFFLE_CLUSTERS, SHUFFLE_TORN = 34, 35, 36  # what a key is for
_LOOKAHEAD = 8  # clusters that may be passed over for one that fits into the end of a batch


class BatchShape(NamedTuple):
    """How a plan's places are cut into batches."""

    num_rows: int
    batch_size: int
    lead: int = 0
    """Places before the first whole batch: they end a batch that began before the plan."""

    def edges(self) -> Int64s:  # (b + 1,)
        """First place of each batch, and the end; the first and the last may be short."""
        inner = np.arange(min(self.lead, self.num_rows), self.num_rows, self.batch_size)
        return np.unique(np.concatenate([[0], inner, [self.num_rows]])).astype(np.int64)


class Layout(NamedTuple):
    """Rows in the order of their places."""

    order: Int64s  # (n,)
    bounds: Int64s  # (k + 1,) what lies between two bounds is of one cluster and one batch
    torn: int
    """Clusters that do not lie in one batch whole."""


class _Dealt(NamedTuple):
    kept: Int64s  # clusters that lie in one batch, batch after batch
    batches: Int64s  # of each
    torn: Int64s  # the others


def shuffled(ids: Int64s, *key: int) -> Int64s:
    """Ids in an order keyed by (key, id): it does not depend on the order they come in."""
    # One id, one word: the mixer is a bijection, so that no two are equal.
    return ids[np.argsort(keyed_words(ids, *key))]


def keyed_words(ids: Int64s, *key: int) -> NDArray[np.uint64]:
    """A random word for each id, distinct for distinct ids."""
    return mix_bits(ids.astype(np.uint64) + derive_key(*key))


def spread(num: int, edges: Int64s) -> Int64s:  # (b,)
    """How many of `num` rows each batch takes, evenly by its size; all of them in all."""
    return np.diff(edges * num // max(1, int(edges[-1])))


def lay_out(clusters: Clusters, loose: Int64s, shape: BatchShape, *key: int) -> Layout:
    """Every row of `clusters` and every loose one, once; `loose` in the order they shall come."""
    edges = shape.edges()
    sizes = np.diff(clusters.bounds)
    sequence = shuffled(np.arange(len(sizes)), *key, SHUFFLE_CLUSTERS)
    one_size = sizes.max(initial=1) - sizes.min(initial=sizes.max(initial=1)) <= 1
    dealt = _deal_alike(sequence, sizes, edges) if one_size else _deal(sequence, sizes, edges)
    rows, pieces = _rows_of(clusters, dealt.kept)
    batches = np.repeat(dealt.batches, sizes[dealt.kept])
    room = np.diff(edges) - np.bincount(batches, minlength=len(edges) - 1)
    rest, rest_pieces = _merge_loose(clusters, dealt.torn, loose, *key)

    batches = np.concatenate([batches, np.repeat(np.arange(len(room)), room)])
    pieces = np.concatenate([pieces, rest_pieces])
    places = np.lexsort([pieces, batches])
    order, pieces, batches = np.concatenate([rows, rest])[places], pieces[places], batches[places]
    changes = np.flatnonzero((np.diff(pieces) != 0) | (np.diff(batches) != 0)) + 1
    bounds = np.concatenate([[0], changes, [len(order)]] if len(order) else [[0]])
    return Layout(order, bounds.astype(np.int64), len(dealt.torn))


def join(layouts: Sequence[Layout]) -> Layout:
    """One layout after the other."""
    starts = np.cumsum([0, *(len(layout.order) for layout in layouts)])
    bounds = [layout.bounds[:-1] + start for layout, start in zip(layouts, starts, strict=False)]
    return Layout(
        np.concatenate([layout.order for layout in layouts]),
        np.concatenate([*bounds, starts[-1:]]),
        sum(layout.torn for layout in layouts),
    )


def _deal_alike(sequence: Int64s, sizes: Int64s, edges: Int64s) -> _Dealt:
    """Clusters of one size, or one fewer: each batch has so many slots."""
    slots = np.diff(edges) // max(1, int(sizes.max(initial=1)))
    num_torn = len(sizes) - int(slots.sum())
    kept, torn = sequence, sequence[:0]
    if num_torn > 0:
        smallest_last = np.argsort(-sizes[sequence], kind="stable")
        is_torn = np.zeros(len(sequence), np.bool_)
        is_torn[smallest_last[len(sequence) - num_torn :]] = True
        kept, torn = sequence[~is_torn], sequence[is_torn]
    ends = np.cumsum(slots)
    # Clusters so far, batch by batch: even, and never more than there are slots.
    until = ends * len(kept) // max(1, int(ends[-1]))
    return _Dealt(kept, np.searchsorted(until, np.arange(len(kept)), side="right"), torn)


def _deal(sequence: Int64s, sizes: Int64s, edges: Int64s) -> _Dealt:
    """Clusters of any sizes: each batch takes the next ones, and what fits into its end."""
    caps = np.diff(edges)
    too_large = sizes[sequence] > caps.max()
    coming = sequence[~too_large].tolist()[::-1]
    rooms = spread(int(sizes[coming].sum()), edges).tolist()
    all_sizes = sizes.tolist()
    waiting: dict[int, list[int]] = defaultdict(list)  # by size
    kept, batches, ahead = [], [], 0
    for batch, (room, cap) in enumerate(zip(rooms, caps.tolist(), strict=True)):
        rest = min(cap, room - ahead)  # what earlier batches took too few of, later ones take
        ahead -= room
        passed = 0
        while rest > 0:
            fitting = max(
                (size for size, some in waiting.items() if some and size <= rest), default=0
            )
            if fitting:
                cluster = waiting[fitting].pop()
            elif coming and passed < _LOOKAHEAD:
                cluster = coming.pop()
                if all_sizes[cluster] > rest:
                    waiting[all_sizes[cluster]].append(cluster)
                    passed += 1
                    continue
            else:
                break
            kept.append(cluster)
            batches.append(batch)
            rest -= all_sizes[cluster]
            ahead += all_sizes[cluster]
    rest_of = [*coming, *(cluster for size in sorted(waiting) for cluster in waiting[size])]
    torn = np.concatenate([sequence[too_large], np.array(rest_of, np.int64)])
    return _Dealt(np.array(kept, np.int64), np.array(batches, np.int64), torn)


def _rows_of(clusters: Clusters, which: Int64s) -> tuple[Int64s, Int64s]:
    """Rows of some clusters, one cluster after the other, and the cluster of each row."""
    sizes = np.diff(clusters.bounds)[which]
    starts = np.repeat(clusters.bounds[which] - np.cumsum(sizes) + sizes, sizes)
    return clusters.order[starts + np.arange(len(starts))], np.repeat(which, sizes)


def _merge_loose(
    clusters: Clusters, torn: Int64s, loose: Int64s, *key: int
) -> tuple[Int64s, Int64s]:
    """Rows of torn clusters with the loose ones spread among them, and a number a piece."""
    rows, pieces = _rows_of(clusters, torn)
    turns = np.repeat(np.arange(len(torn)), np.diff(clusters.bounds)[torn])
    # A cluster above the size of a batch is cut at random, not by id.
    rows = rows[np.lexsort([keyed_words(rows, *key, SHUFFLE_TORN), turns])]
    marks = [(np.arange(len(part)) + 0.5) / max(1, len(part)) for part in (rows, loose)]
    places = np.argsort(np.concatenate(marks), kind="stable")
    alone = len(clusters.bounds) + np.arange(len(loose))
    return np.concatenate([rows, loose])[places], np.concatenate([pieces, alone])[places]
