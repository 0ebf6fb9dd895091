"""Who belongs together: one function a planner, from samples to a layout."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data.config import NegativesConfig
from data.negatives.columns import SampleColumns
from data.negatives.layout import BatchShape, Layout, lay_out
from data.negatives.store import Snapshot
from data.negatives.tree import Clusters, Work, balanced_clusters

Int64s = NDArray[np.int64]


class Affinity(NamedTuple):
    """What a planner goes by."""

    snapshot: Snapshot | None
    columns: SampleColumns
    knobs: NegativesConfig
    batch_size: int
    seed: int
    """Of this plan."""
    work: Work

    def has_rows(self, ids: Int64s) -> NDArray[np.bool_]:  # (n,)
        """Samples that the planner can place; the others are laid at random."""
        alone = self.knobs.planner == "tree" and self.knobs.cluster_size == 1
        if self.knobs.planner == "random" or alone or self.snapshot is None:
            return np.zeros(len(ids), np.bool_)
        return self.snapshot.seen[ids]


def cluster_rows(ids: Int64s, loose: Int64s, affinity: Affinity, shape: BatchShape) -> Layout:
    """A place for each of `ids`, ascending, beside their like, and for each loose sample."""
    if affinity.snapshot is None:
        return lay_out(Clusters(ids, np.zeros(1, np.int64)), loose, shape, affinity.seed)
    size, seed = affinity.knobs.cluster_size, affinity.seed
    clusters = balanced_clusters(affinity.snapshot.rows, size, seed, ids=ids, work=affinity.work)
    return lay_out(clusters, loose, shape, affinity.seed)
