"""Who belongs together: from samples to a layout, one function a planner.

planner      near by                         a batch
random       -                               drawn
tree         balanced 2-means (NGAME)        whole clusters of `cluster_size`, drawn
greedy       nearest neighbours              anchors with their neighbours (Sample4Geo)
topics       balanced 2-means, large         of one topic, alike in margins (TAS-Balanced)
coordinates  places, then embeddings         as greedy
identities   mean embeddings of identities   P identities x K images, `cluster_size` near ones
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data.config import NegativesConfig
from data.negatives.columns import SampleColumns
from data.negatives.layout import SHUFFLE_ROWS, BatchShape, Layout, keyed_words, lay_out, shuffled
from data.negatives.near_identities import lay_out_identities
from data.negatives.neighbours import choose_companions, nearest, pack_greedily
from data.negatives.store import Snapshot, unit_rows
from data.negatives.tree import Clusters, Rows, Work, balanced_clusters, read_rows

Int64s = NDArray[np.int64]

_LEFT_OVER, _DEALT = 42, 43  # what a key is for
_TOPIC_BATCHES = 4


class Affinity(NamedTuple):
    """What a planner goes by."""

    snapshot: Snapshot | None
    columns: SampleColumns
    knobs: NegativesConfig
    seed: int
    """Of this plan."""
    work: Work

    @property
    def rows(self) -> Rows | None:
        """Unit rows that are near where samples are alike; None: none yet."""
        if self.snapshot is None and self.knobs.planner == "coordinates":
            return self.columns.coordinates
        return None if self.snapshot is None else self.snapshot.rows

    def placeable(self, ids: Int64s) -> NDArray[np.bool_]:  # (n,)
        """Samples that the planner can place; the others are laid at random."""
        planner = self.knobs.planner
        if planner == "identities":
            return self.columns.need("labels", 'negatives.planner = "identities"')[ids] >= 0
        alone = planner == "tree" and self.knobs.cluster_size == 1
        if planner == "random" or alone or self.rows is None:
            return np.zeros(len(ids), np.bool_)
        if self.snapshot is not None:
            return self.snapshot.seen[ids]
        return np.isfinite(self.rows[ids].astype(np.float32).sum(axis=1))


def cluster_rows(ids: Int64s, loose: Int64s, affinity: Affinity, shape: BatchShape) -> Layout:
    """A place for each of `ids`, ascending, beside their like, and for each loose sample."""
    planner, rows = affinity.knobs.planner, affinity.rows
    if not len(ids):
        return lay_out(Clusters(ids, np.zeros(1, np.int64)), loose, shape, affinity.seed)
    if planner == "identities":
        return _identities(ids, loose, affinity, shape)
    if rows is None:
        raise ValueError(f"{planner}: no rows to plan by")
    if planner in ("greedy", "coordinates"):
        return _greedy(rows, ids, loose, affinity, shape)
    if planner == "topics":
        return _topics(rows, ids, loose, affinity, shape)
    size = affinity.knobs.cluster_size
    whole, left = _whole_clusters(ids, size, affinity.seed)
    clusters = balanced_clusters(rows, size, affinity.seed, ids=whole, work=affinity.work)
    return lay_out(clusters, np.concatenate([loose, left]), shape, affinity.seed)


def _whole_clusters(ids: Int64s, size: int, seed: int) -> tuple[Int64s, Int64s]:
    """(ids for clusters of exactly `size`, the few that are left over, drawn): such ones pack."""
    num_left = len(ids) % size if len(ids) > size else 0
    if not num_left:
        return ids, ids[:0]
    is_left = np.zeros(len(ids), np.bool_)
    is_left[np.argpartition(keyed_words(ids, seed, _LEFT_OVER), num_left)[:num_left]] = True
    return ids[~is_left], shuffled(ids[is_left], seed, SHUFFLE_ROWS)


def _greedy(
    rows: Rows, ids: Int64s, loose: Int64s, affinity: Affinity, shape: BatchShape
) -> Layout:
    knobs, seed = affinity.knobs, affinity.seed
    width = min(knobs.skip_nearest + 2 * knobs.neighbours, max(1, len(ids) - 1))
    labels = apart = None
    if "label" in knobs.unique:
        apart = affinity.columns.lists if affinity.columns.labels is None else None
        if apart is None:
            labels = affinity.columns.need("labels", 'negatives.unique = ["label"]')[ids]
    lists = nearest(rows, ids, width, seed, affinity.work, labels=apart)[:, knobs.skip_nearest :]
    companions = choose_companions(lists, knobs.neighbours, seed)
    return pack_greedily(ids, companions, labels, loose, shape, seed)


def _topics(
    rows: Rows, ids: Int64s, loose: Int64s, affinity: Affinity, shape: BatchShape
) -> Layout:
    """Batches of one topic; each has its share of every margin bin of the topic.

    Hofstaetter et al. 2021, arXiv 2104.06967, section 3, draw with replacement until bins are
    equally full; here every sample comes once, so a topic's batches are alike instead.
    """
    knobs, seed = affinity.knobs, affinity.seed
    part = max(1, shape.batch_size * len(ids) // shape.num_rows)
    num_parts = -(-knobs.cluster_size // part) if knobs.cluster_size > part else _TOPIC_BATCHES
    whole, left = _whole_clusters(ids, part, seed)
    size = part * num_parts
    topics = balanced_clusters(rows, size, seed, ids=whole, work=affinity.work)
    margins = affinity.columns.margins
    values = margins[topics.order] if margins is not None else _spread_margins(rows, topics)
    bins = _margin_bins(values, knobs.margin_bins)
    topic = np.repeat(np.arange(len(topics.bounds) - 1), np.diff(topics.bounds))
    sequence = np.lexsort([keyed_words(topics.order, seed, _DEALT), bins, topic])
    # Dealing a sorted topic in turn gives each of its batches its share of every bin.
    counts = np.diff(topics.bounds)
    turns = np.arange(len(sequence)) - np.repeat(topics.bounds[:-1], counts)
    hands = -(-counts // part)  # none is larger than a batch has room for
    first = np.cumsum(hands) - hands
    hand = np.repeat(first, counts) + turns % np.repeat(hands, counts)
    dealt = np.argsort(hand, kind="stable")
    bounds = np.concatenate([[0], np.cumsum(np.bincount(hand))]).astype(np.int64)
    clusters = Clusters(topics.order[sequence][dealt], bounds)
    return lay_out(clusters, np.concatenate([loose, left]), shape, seed)


def _margin_bins(values: NDArray[np.float32], num: int) -> Int64s:  # (n,) -> (n,)
    """Bins of equal width; a margin that is not known, NaN, is in one of its own after them."""
    known = np.isfinite(values)
    bins = np.full(len(values), num, np.int64)
    if known.any():
        low, high = float(values[known].min()), float(values[known].max())
        width = (high - low) / num or 1.0
        bins[known] = np.minimum((values[known] - low) / width, num - 1)
    return bins


def _spread_margins(rows: Rows, topics: Clusters) -> NDArray[np.float32]:  # (n,)
    """1 - cosine to the topic's mean: what stands in where no teacher gave margins."""
    values = np.empty(len(topics.order), np.float32)
    for start, stop in zip(topics.bounds[:-1].tolist(), topics.bounds[1:].tolist(), strict=True):
        mine = unit_rows(read_rows(rows, topics.order[start:stop]))
        mean = unit_rows(mine.mean(axis=0, keepdims=True))
        values[start:stop] = 1 - np.einsum("nd,kd->n", mine, mean)
    return values


def _identities(ids: Int64s, loose: Int64s, affinity: Affinity, shape: BatchShape) -> Layout:
    labels = affinity.columns.need("labels", 'negatives.planner = "identities"')
    return lay_out_identities(
        ids,
        labels[ids],
        loose,
        shape,
        snapshot=affinity.snapshot,
        images=affinity.columns.images_per_identity,
        cluster_size=affinity.knobs.cluster_size,
        seed=affinity.seed,
        work=affinity.work,
    )
