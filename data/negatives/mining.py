"""Explicit negatives and row weights: what a plan may carry beside its order."""

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.errors import DataError
from data.label_lists import LabelLists
from data.negatives.neighbours import nearest
from data.negatives.plan import BatchPlan
from data.negatives.store import Snapshot
from data.negatives.tree import ONE_THREAD, Work

Ids = NDArray[np.signedinteger[Any]]


def mine_negatives(
    plan: BatchPlan,
    snapshot: Snapshot,
    num: int,
    *,
    skip: int = 0,
    labels: LabelLists | None = None,  # N rows; samples that share one are positives
    work: Work = ONE_THREAD,
) -> Ids:  # (n, num) sample ids by place, the hardest first; -1: there are no more
    """Nearest neighbours of each planned sample among all that have an embedding, the `skip`
    nearest passed over (they may be unlabelled positives), known positives never among them.

    Samples without an embedding, or with an empty list of labels, neither have nor are negatives.
    Raises DataError for embeddings that are not finite.
    """
    usable = snapshot.seen if labels is None else snapshot.seen & (labels.counts > 0)
    ids = np.flatnonzero(usable)
    kind = np.int32 if len(snapshot.rows) <= np.iinfo(np.int32).max else np.int64
    found = np.full((len(snapshot.rows), num), -1, kind)
    if len(ids) > 1 and num:
        width = min(num + skip, len(ids) - 1)
        lists = nearest(snapshot.rows, ids, width, plan.header.seed, work, labels=labels)[:, skip:]
        found[ids, : lists.shape[1]] = np.where(lists >= 0, ids[lists], -1)
    return found[plan.order]


def attach(
    plan: BatchPlan,
    *,
    negatives: Ids | None = None,  # (n, h) sample ids by place, -1: none
    row_weights: NDArray[np.float32] | None = None,  # (n,) by place
) -> BatchPlan:
    """The plan with what is given beside what it has. Raises DataError for what does not fit."""
    num = len(plan.order)
    if negatives is not None and (negatives.ndim != 2 or len(negatives) != num):
        raise DataError(f"negatives of shape {negatives.shape} for a plan of {num:,} samples")
    if row_weights is not None:
        good = row_weights.shape == (num,) and np.isfinite(row_weights).all()
        if not good or row_weights.min() < 0:
            raise DataError(
                f"row weights of shape {row_weights.shape} for a plan of {num:,} samples: they "
                "must be finite and none below 0"
            )
    return replace(
        plan,
        negatives=plan.negatives if negatives is None else negatives,
        row_weights=plan.row_weights if row_weights is None else row_weights,
    )
