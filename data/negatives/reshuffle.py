"""The clusters of a plan that is there, shuffled and laid into batches again.

For epochs between two plans, and where a plan comes too late for some of its samples.
"""

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.errors import DataError
from data.negatives.columns import SampleColumns
from data.negatives.constraints import Rules, keep_apart
from data.negatives.layout import SHUFFLE_ROWS, BatchShape, lay_out, shuffled
from data.negatives.plan import BatchPlan, Head, derived_seed
from data.negatives.tree import Clusters

Int64s = NDArray[np.int64]


def reshuffle_plan(
    plan: BatchPlan,
    ids: Int64s,  # (n,) samples to be laid out, each once
    *,
    version: int,
    asked_step: int,
    salt: int = 0,
    head: Head = Head(),  # noqa: B008 - frozen
    columns: SampleColumns = SampleColumns(),  # noqa: B008 - frozen
) -> BatchPlan:
    """A plan of `ids` by the clusters of `plan`; what it does not have is laid at random.

    Samples keep the explicit negatives that they have there. A pure function; `salt` tells two of
    one version apart. Raises DataError for a negative id.
    """
    if len(ids) and ids.min() < 0:
        raise DataError(f"sample {ids.min()} is to be planned: ids count from 0")
    seed = derived_seed(derived_seed(plan.header.seed, version), salt)
    size = 1 + max(int(ids.max(initial=0)), int(plan.order.max(initial=0)))
    wanted = np.zeros(size, np.bool_)
    wanted[ids] = True
    places = np.flatnonzero(wanted[plan.order])
    order = np.asarray(plan.order[places], np.int64)
    wanted[order] = False
    loose = shuffled(np.flatnonzero(wanted).astype(np.int64), seed, SHUFFLE_ROWS)
    changes = np.flatnonzero(np.diff(plan.clusters_at(places))) + 1
    bounds = np.concatenate([[0], changes, [len(order)]] if len(order) else [[0]])
    shape = BatchShape(len(ids), plan.header.batch_size, min(head.places, len(ids)))
    layout = lay_out(Clusters(order, bounds.astype(np.int64)), loose, shape, seed)
    rules = Rules.of(tuple(plan.header.knobs.get("unique", ())), columns, head.avoid)
    layout, broken = keep_apart(layout, shape, rules, seed)
    header = replace(
        plan.header,
        version=version,
        lead=shape.lead,
        asked_step=asked_step,
        num_samples=len(ids),
        num_random=len(loose),
        num_clusters=len(layout.bounds) - 1 - len(loose),
        num_torn=layout.torn,
        num_broken=broken,
        num_left_over=(shape.num_rows - shape.lead) % shape.batch_size,
        sha256="",
    )
    negatives = None if plan.negatives is None else _by_place(plan, layout.order, size)
    return BatchPlan(layout.order, layout.bounds, header, negatives)


def _by_place(
    plan: BatchPlan,
    order: Int64s,  # (n,)
    size: int,  # above all ids
) -> NDArray[np.signedinteger[Any]]:  # (n, h)
    """The plan's explicit negatives for another order of samples, -1 for those it does not have."""
    places = np.full(size, -1, np.int64)
    places[plan.order] = np.arange(len(plan.order))
    found = np.asarray(plan.negatives)[places[order]]
    found[places[order] < 0] = -1
    return found
