"""How hard a plan's batches are, from a snapshot: to compare plans before spending time on them."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data.negatives.plan import BatchPlan
from data.negatives.store import Snapshot, unit_rows

Int64s = NDArray[np.int64]
_TILE = 1024  # rows of a batch that are held against all of it at a time


class Hardness(NamedTuple):
    """Means over the rows of some batches; cosines are between embeddings of one side."""

    hardest: float
    """Highest cosine to another sample of the batch that is no positive."""
    top10: float
    """Mean of the ten highest."""
    mate_share: float
    """Rows whose hardest one is of their cluster: the plan's own work."""
    twins: float
    """Rows that meet an unlabelled twin: false negatives; NaN without twins."""
    distinct_labels: float
    """Labels in a batch over its samples; NaN without labels."""
    shards: float
    """Distinct shards in a batch; NaN without shards."""
    num_rows: int
    """Rows that were looked at."""


def measure_hardness(
    plan: BatchPlan,
    snapshot: Snapshot,
    *,
    labels: Int64s | None = None,  # (N,) samples of equal label are positives; -1: of none
    twins: Int64s | None = None,  # (N,) samples of equal number mean the same; -1: alone
    shards: Int64s | None = None,  # (N,)
    num_batches: int = 16,
) -> Hardness:
    """Over batches spread evenly over the plan, unseen samples left out."""
    edges = plan.edges()
    chosen = np.unique(np.linspace(0, len(edges) - 2, num_batches).astype(np.int64))
    found = [
        _measure_batch(plan, snapshot, slice(int(edges[at]), int(edges[at + 1])), labels, twins)
        for at in chosen.tolist()
    ]
    sums = np.sum([sums for sums, _ in found], axis=0)
    num_rows = sum(num for _, num in found)
    means = (sums / max(1, num_rows)).tolist()
    batches = [plan.order[edges[at] : edges[at + 1]] for at in chosen.tolist()]
    return Hardness(
        hardest=means[0],
        top10=means[1],
        mate_share=means[2],
        twins=means[3] if twins is not None else float("nan"),
        distinct_labels=_mean([_distinct(labels, ids) / len(ids) for ids in batches]),
        shards=_mean([_distinct(shards, ids) for ids in batches]),
        num_rows=num_rows,
    )


def _measure_batch(
    plan: BatchPlan, snapshot: Snapshot, where: slice, labels: Int64s | None, twins: Int64s | None
) -> tuple[NDArray[np.float64], int]:
    """Sums of (hardest, top 10, mate, twin) over the rows of a batch, and their number."""
    places = np.arange(where.start, where.stop)
    places = places[snapshot.seen[plan.order[places]]]
    sums = np.zeros(4)
    if len(places) < 2:
        return sums, 0
    ids, clusters = plan.order[places], plan.clusters_at(places)
    rows = unit_rows(snapshot.read(ids))
    for start in range(0, len(ids), _TILE):
        mine = np.arange(start, min(start + _TILE, len(ids)))
        cosines = rows[mine] @ rows.T
        cosines[np.arange(len(mine)), mine] = -1
        if labels is not None:
            own = labels[ids[mine]]
            cosines[(own[:, None] == labels[ids]) & (own[:, None] >= 0)] = -1
        top = -np.sort(-cosines, axis=1)[:, :10]
        sums += [
            top[:, 0].sum(),
            top.mean(axis=1).sum(),
            (clusters[cosines.argmax(axis=1)] == clusters[mine]).sum(),
            _meet(twins, ids, mine) if twins is not None else 0,
        ]
    return sums, len(ids)


def _meet(twins: Int64s, ids: Int64s, mine: Int64s) -> int:
    """Rows that have a twin in the batch."""
    numbers, counts = np.unique(twins[ids], return_counts=True)
    own = twins[ids[mine]]
    return int(((counts[np.searchsorted(numbers, own)] > 1) & (own >= 0)).sum())


def _distinct(column: Int64s | None, ids: Int64s) -> float:
    return float("nan") if column is None else float(len(np.unique(column[ids])))


def _mean(values: list[float]) -> float:
    return float(np.mean(values))
