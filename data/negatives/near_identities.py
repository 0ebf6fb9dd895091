"""Batches of P identities with K images each, identities that look alike together.

An identity's images, in a keyed order, are cut into groups of K; what is left over is laid at
random. The groups go to rounds, an identity's to different rounds as far as those suffice, and each
round is laid out for itself: its identities are clustered by the means of their embeddings, and
clusters of `cluster_size` identities are shuffled and laid into batches. So a batch holds groups of
an identity twice only at the border of two rounds, or where it has more groups than there are
rounds.
"""

import numpy as np
from numpy.typing import NDArray

from data.negatives.layout import (
    SHUFFLE_ROWS,
    BatchShape,
    Layout,
    join,
    keyed_words,
    lay_out,
    shuffled,
    spread,
)
from data.negatives.store import Snapshot, unit_rows
from data.negatives.tree import Clusters, Work, balanced_clusters, check_finite, pieces, read_rows
from data.order import derive_key

Int64s = NDArray[np.int64]
Floats = NDArray[np.float32]
Bools = NDArray[np.bool_]

_IMAGES, _ROUNDS, _TREE = 44, 45, 46  # what a key is for
_AGAIN = 0.1
"""Rounds are so many that at most this share of the groups meets its identity in its round."""


def lay_out_identities(
    ids: Int64s,  # (n,) ascending
    labels: Int64s,  # (n,) from 0 on
    loose: Int64s,
    shape: BatchShape,
    *,
    snapshot: Snapshot | None,
    images: int,  # K
    cluster_size: int,
    seed: int,
    work: Work,
) -> Layout:
    """Every sample once; identities without an embedding stand alone."""
    identities, codes, counts = np.unique(labels, return_inverse=True, return_counts=True)
    sequence = np.lexsort([keyed_words(ids, seed, _IMAGES), codes])
    turns = np.arange(len(ids)) - np.repeat(np.cumsum(counts) - counts, counts)
    in_group = turns < np.repeat(counts // images * images, counts)
    left = shuffled(ids[sequence[~in_group]], seed, SHUFFLE_ROWS)
    rest = np.concatenate([loose, left])
    groups = ids[sequence[in_group]].reshape(-1, images)
    if not len(groups):
        return lay_out(Clusters(rest[:0], np.zeros(1, np.int64)), rest, shape, seed)
    owners = np.repeat(np.arange(len(counts)), counts // images)
    centers, known = _centers(ids[sequence], codes[sequence], len(counts), snapshot, work)
    rounds, again = _rounds(identities, counts // images, shape.batch_size // images, seed)

    ends = np.concatenate([[0], np.cumsum(np.bincount(rounds))])
    cuts = np.concatenate([[0], np.cumsum(spread(len(rest), ends))])
    layouts, start = [], -shape.lead
    for number in range(len(ends) - 1):
        here = np.flatnonzero(rounds == number)
        alone = again[here] | ~known[owners[here]]
        key = int(derive_key(seed, _TREE, number).view(np.int64)[0])
        clusters = _cluster(groups[here], centers[owners[here]], alone, cluster_size, key, work)
        mine = rest[cuts[number] : cuts[number + 1]]
        num_rows = len(clusters.order) + len(mine)
        part = BatchShape(num_rows, shape.batch_size, -start % shape.batch_size)
        layouts.append(lay_out(clusters, mine, part, key))
        start += num_rows
    return join(layouts)


def _cluster(
    groups: Int64s,  # (g, K)
    centers: Floats,  # (g, d)
    alone: Bools,  # (g,) groups that are a cluster for themselves
    cluster_size: int,
    seed: int,
    work: Work,
) -> Clusters:
    near = np.flatnonzero(~alone)
    tree = balanced_clusters(centers, cluster_size, seed, ids=near, work=Work(work.threads))
    order = np.concatenate([tree.order, np.flatnonzero(alone)])
    single = np.arange(len(near) + 1, len(groups) + 1)
    bounds = np.concatenate([tree.bounds, single]) * groups.shape[1]
    return Clusters(groups[order].reshape(-1), bounds)


def _centers(
    ids: Int64s, codes: Int64s, num: int, snapshot: Snapshot | None, work: Work
) -> tuple[Floats, Bools]:  # (num, d) unit means, (num,) whether there is one
    """Mean embeddings of identities over the images that were seen; `codes` ascending."""
    if snapshot is None:
        return np.zeros((num, 1), np.float32), np.zeros(num, np.bool_)
    seen = snapshot.seen[ids]
    ids, codes = ids[seen], codes[seen]
    check_finite(snapshot.rows, ids, work)
    sums = np.zeros((num, snapshot.rows.shape[1]), np.float32)
    for piece in pieces(0, len(ids)):
        present, first = np.unique(codes[piece], return_index=True)
        sums[present] += np.add.reduceat(unit_rows(read_rows(snapshot.rows, ids[piece])), first)
    known = np.zeros(num, np.bool_)
    known[codes] = True
    return unit_rows(sums), known


def _rounds(
    identities: Int64s, counts: Int64s, groups_in_batch: int, seed: int
) -> tuple[Int64s, Bools]:  # (g,) round of each group, (g,) whether its identity is there already
    """An identity's groups go round the rounds from a keyed one on, as far apart as they can."""
    total = int(counts.sum())
    turns = np.arange(total) - np.repeat(np.cumsum(counts) - counts, counts)
    until = np.cumsum(np.bincount(turns))  # groups among the first r + 1 of their identity
    enough = 1 + int(np.searchsorted(until, (1 - _AGAIN) * total))
    num = max(1, min(enough, total // max(1, groups_in_batch)))
    first = (keyed_words(identities, seed, _ROUNDS) % np.uint64(num)).astype(np.int64)
    step = turns * num // np.repeat(np.minimum(counts, num), counts)
    return (np.repeat(first, counts) + step) % num, turns >= num
