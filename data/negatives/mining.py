"""Explicit negatives and row weights: what a plan may carry beside its order."""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from data.errors import DataError
from data.negatives.neighbours import nearest
from data.negatives.plan import BatchPlan
from data.negatives.store import Snapshot
from data.negatives.tree import ONE_THREAD, Work

Int64s = NDArray[np.int64]

_POSITIVES = 256
"""A label's samples beyond so many are not looked past: their lists may come out short."""


def mine_negatives(
    plan: BatchPlan,
    snapshot: Snapshot,
    num: int,
    *,
    skip: int = 0,
    labels: Int64s | None = None,  # (N,) samples of equal label are positives; -1: of none
    work: Work = ONE_THREAD,
) -> Int64s:  # (n, num) sample ids by place, the hardest first; -1: there are no more
    """Nearest neighbours of each planned sample among the planned ones, the `skip` nearest passed
    over (they may be unlabelled positives), known positives never among them.
    """
    ids = np.sort(plan.order[snapshot.seen[plan.order]])
    found = np.full((len(snapshot.rows), num), -1, np.int64)
    if len(ids) > 1:
        # Positives are the nearest of all.
        known = 0 if labels is None else int(np.bincount(labels[ids] + 1)[1:].max(initial=0))
        width = min(num + skip + min(known, _POSITIVES), len(ids) - 1)
        lists = nearest(snapshot.rows, ids, width, plan.header.seed, work).astype(np.int64)
        lists = np.where(lists >= 0, ids[lists], -1)
        if labels is not None:
            own = labels[ids][:, None]
            lists[(lists >= 0) & (labels[lists] == own) & (own >= 0)] = -1
        # Those that are left move up, in their order.
        lists = np.take_along_axis(lists, np.argsort(lists < 0, axis=1, kind="stable"), axis=1)
        kept = lists[:, skip : skip + num]
        found[ids, : kept.shape[1]] = kept
    return found[plan.order]


def attach(
    plan: BatchPlan,
    *,
    negatives: Int64s | None = None,  # (n, h) sample ids by place, -1: none
    row_weights: NDArray[np.float32] | None = None,  # (n,) by place; their mean becomes 1
) -> BatchPlan:
    """The plan with what is given beside it. Raises DataError for what does not fit."""
    num = len(plan.order)
    if negatives is not None and (negatives.ndim != 2 or len(negatives) != num):
        raise DataError(f"negatives of shape {negatives.shape} for a plan of {num:,} samples")
    if row_weights is not None:
        good = row_weights.shape == (num,) and np.isfinite(row_weights).all()
        if not good or row_weights.min() < 0 or not row_weights.any():
            raise DataError(
                f"row weights of shape {row_weights.shape} for a plan of {num:,} samples: they "
                "must be finite, none below 0 and not all 0"
            )
        row_weights = (row_weights / row_weights.mean()).astype(np.float32)
    return replace(plan, negatives=negatives, row_weights=row_weights)
