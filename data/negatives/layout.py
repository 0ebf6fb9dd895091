"""Clusters -> batches: which cluster goes into which batch, and what becomes of the rest.

Places 0 to n of a plan are cut into batches at `BatchShape.edges`. Clusters are shuffled and laid
into batches whole; loose rows (drawn at random, unseen) fill what is left, spread evenly. Where
whole clusters cannot fill the batches (their size divides none), as few as possible are torn: their
rows stay together in the gaps of consecutive batches. So every row has one place, whatever fits.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data.negatives.tree import Clusters
from data.order import derive_key, mix_bits

Int64s = NDArray[np.int64]

SHUFFLE_ROWS, SHUFFLE_CLUSTERS, SHUFFLE_TORN = 34, 35, 36  # what a key is for


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


def shuffled(ids: Int64s, *key: int) -> Int64s:
    """Ids in an order keyed by (key, id): it does not depend on the order they come in."""
    # One id, one word: the mixer is a bijection, so that no two are equal.
    return ids[np.argsort(keyed_words(ids, *key))]


def keyed_words(ids: Int64s, *key: int) -> NDArray[np.uint64]:
    """A random word for each id, distinct for distinct ids."""
    return mix_bits(ids.astype(np.uint64) + derive_key(*key))


def lay_out(clusters: Clusters, loose: Int64s, shape: BatchShape, *key: int) -> Layout:
    """Every row of `clusters` and every loose one, once; `loose` in the order they shall come."""
    edges = shape.edges()
    sizes = np.diff(clusters.bounds)
    slot = int(sizes.max(initial=1))
    slots = np.diff(edges) // slot
    sequence = shuffled(np.arange(len(sizes)), *key, SHUFFLE_CLUSTERS)
    kept, torn = _choose_torn(sequence, sizes, len(sizes) - int(slots.sum()))
    ends = np.cumsum(slots)
    total = max(1, int(ends[-1]))
    # Clusters so far, batch by batch: even, and never more than there are slots.
    until = ends * len(kept) // total
    batch_of = np.searchsorted(until, np.arange(len(kept)), side="right")

    rows, pieces = _rows_of(clusters, kept)
    batches = np.repeat(batch_of, sizes[kept])
    room = np.diff(edges) - np.bincount(batches, minlength=len(edges) - 1)
    rest, rest_pieces = _merge_loose(clusters, torn, loose, *key)
    rest_batches = np.repeat(np.arange(len(room)), room)

    batches = np.concatenate([batches, rest_batches])
    pieces = np.concatenate([pieces, rest_pieces])
    places = np.lexsort([pieces, batches])
    order, pieces, batches = np.concatenate([rows, rest])[places], pieces[places], batches[places]
    changes = np.flatnonzero((np.diff(pieces) != 0) | (np.diff(batches) != 0)) + 1
    bounds = np.concatenate([[0], changes, [len(order)]] if len(order) else [[0]])
    return Layout(order, bounds.astype(np.int64), len(torn))


def _choose_torn(sequence: Int64s, sizes: Int64s, num: int) -> tuple[Int64s, Int64s]:
    """(kept, torn) clusters in their sequence: the `num` smallest are torn, the last of them."""
    if num <= 0:
        return sequence, sequence[:0]
    smallest_last = np.argsort(-sizes[sequence], kind="stable")
    is_torn = np.zeros(len(sequence), np.bool_)
    is_torn[smallest_last[len(sequence) - num :]] = True
    return sequence[~is_torn], sequence[is_torn]


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
    within = np.lexsort([keyed_words(rows, *key, SHUFFLE_TORN), np.repeat(
        np.arange(len(torn)), np.diff(clusters.bounds)[torn])])  # fmt: skip
    rows = rows[within]  # a cluster above the size of a batch is cut at random, not by id
    marks = np.concatenate(
        [
            (np.arange(len(rows)) + 0.5) / max(1, len(rows)),
            (np.arange(len(loose)) + 0.5) / max(1, len(loose)),
        ]
    )
    places = np.argsort(marks, kind="stable")
    alone = len(clusters.bounds) + np.arange(len(loose))
    return np.concatenate([rows, loose])[places], np.concatenate([pieces, alone])[places]
