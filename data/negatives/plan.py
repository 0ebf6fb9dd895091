"""A plan: the order of some samples in batches of each other's hard negatives, kept as a file.

`make_plan` is a pure function of (snapshot, ids, knobs, seed, version, batch size, head, columns):
ranks, threads and time play no part. Its result is stored all the same and never recomputed, as one
ulp in an embedding makes other clusters on another machine. Who meets whom is decided in three
steps: clusters (`packers.py`), batches (`layout.py`), constraints (`constraints.py`).
Memory of random and tree plans: 120 bytes a sample beside the snapshot (measured at 10 million).
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data.config import NegativesConfig
from data.errors import DataError
from data.negatives.columns import NO_COLUMNS, SampleColumns
from data.negatives.constraints import Rules, keep_apart
from data.negatives.files import load_arrays, read_header, save_arrays
from data.negatives.layout import SHUFFLE_ROWS, BatchShape, Layout, join, keyed_words, shuffled
from data.negatives.packers import Affinity, cluster_rows
from data.negatives.store import Snapshot, check_fingerprint
from data.negatives.tree import ONE_THREAD, Work
from data.order import derive_key

Int64s = NDArray[np.int64]

PLAN_FORMAT = 1
PLANNER_VERSION = 1
"""Another version makes another plan of the same snapshot."""

_HEADER = "plan.json"
_RANDOM_SHARE, _GROUPS = 37, 38  # what a key is for


class Head(NamedTuple):
    """A batch that began before the plan."""

    places: int = 0
    """Its places that the plan fills: the plan's first ones."""
    avoid: Int64s = np.zeros(0, np.int64)
    """Samples it holds already: they come later, and what may not be twice is not like them."""


NO_HEAD = Head()


@dataclass(frozen=True)
class PlanHeader:
    """What a plan is of, and what became of it."""

    format: int
    planner_version: int
    version: int
    """Number of the plan in its run."""
    seed: int
    batch_size: int
    lead: int
    """Places before the first whole batch."""
    asked_step: int
    knobs: dict[str, Any]
    fingerprint: str
    """Of the data set."""
    snapshot: str
    """SHA-256 of the snapshot; empty: none."""
    num_samples: int
    num_random: int
    """Samples without a mate beside them: drawn by `random_share`, unseen, or left over."""
    num_unseen: int
    """Samples without an embedding; all, where there is no snapshot."""
    num_clusters: int
    """Runs of at least two samples between two bounds."""
    num_torn: int
    """Clusters that no batch holds whole."""
    num_broken: int
    """Samples that share a batch with their like against `unique`, or with themselves: no place
    was left for them."""
    num_left_over: int
    """Samples after the last whole batch."""
    sha256: str = ""
    """Of all of it; empty until it is saved."""


@dataclass(frozen=True)
class BatchPlan:
    """Samples by place; batches are cut from it in order."""

    order: Int64s  # (n,) each sample once
    bounds: Int64s  # (k + 1,) rows between two bounds are of one cluster and one batch
    header: PlanHeader
    negatives: NDArray[np.signedinteger[Any]] | None = None
    """(n, h) samples to be seen as negatives beside; -1: none."""
    row_weights: NDArray[np.float32] | None = None
    """(n,) what the samples' losses are multiplied by."""

    def clusters_at(self, places: Int64s) -> Int64s:
        """Number of the cluster that each place is of."""
        return np.searchsorted(self.bounds, places, side="right") - 1

    def edges(self) -> Int64s:  # (b + 1,)
        """First place of each batch, and the end."""
        return BatchShape(len(self.order), self.header.batch_size, self.header.lead).edges()

    def arrays(self) -> dict[str, NDArray[Any]]:
        """All there are, by name."""
        arrays: dict[str, NDArray[Any]] = {"order": self.order, "bounds": self.bounds}
        if self.negatives is not None:
            arrays["negatives"] = self.negatives
        if self.row_weights is not None:
            arrays["row_weights"] = self.row_weights
        return arrays

    @classmethod
    def of(cls, header: PlanHeader, arrays: Mapping[str, NDArray[Any]]) -> "BatchPlan":
        """The plan that `arrays()` are of."""
        return cls(
            arrays["order"], arrays["bounds"], header, arrays.get("negatives"),
            arrays.get("row_weights"),
        )  # fmt: skip

    def save(self, folder: Path) -> "BatchPlan":
        """Write it whole or not at all; the plan with its SHA-256."""
        header = asdict(self.header)
        header.pop("sha256")
        digest = save_arrays(folder, _HEADER, self.arrays(), header)
        return replace(self, header=replace(self.header, sha256=digest))

    @classmethod
    def load(
        cls,
        folder: Path,
        fingerprint: str | None = None,
        sha256: str | None = None,
        *,
        verify: bool = True,
    ) -> "BatchPlan":
        """Open a plan, memory-mapped.

        Raises DataError where it is torn or changed, of another data set than `fingerprint`, or
        another plan than `sha256`.
        """
        header, arrays = load_arrays(folder, _HEADER, verify=verify)
        found = _parse_header(folder, header)
        check_fingerprint(folder, found.fingerprint, fingerprint)
        if sha256 is not None and found.sha256 != sha256:
            raise DataError(
                f"{folder}: holds the plan {found.sha256[:12]}, and the run goes by "
                f"{sha256[:12]}: the folder was overwritten; resume from a later checkpoint or "
                "start a new run"
            )
        return cls.of(found, arrays)


def load_header(folder: Path) -> PlanHeader:
    """The header of a saved plan alone; DataError where there is none."""
    header = read_header(folder, _HEADER)
    header.pop("arrays")
    return _parse_header(folder, header)


def _parse_header(folder: Path, header: dict[str, Any]) -> PlanHeader:
    if header.get("format") != PLAN_FORMAT:
        raise DataError(
            f"{folder}: a plan of format {header.get('format')}, this is {PLAN_FORMAT}: go on with "
            "the version of nsphere that made it, or start a new run"
        )
    return PlanHeader(**header)


def make_plan(
    snapshot: Snapshot | None,
    ids: Int64s,  # (n,) samples to be planned, each once, in any order
    knobs: NegativesConfig,
    *,
    seed: int,
    version: int,
    batch_size: int,
    asked_step: int = 0,
    head: Head = NO_HEAD,
    columns: SampleColumns = NO_COLUMNS,
    work: Work = ONE_THREAD,
) -> BatchPlan:
    """The order of `ids`; `knobs.cluster_size` is taken as it stands (`grown_cluster_size`).

    Without a snapshot, and for samples that it has not seen, the order is random, but for the
    planner "coordinates". Raises DataError for ids that are not distinct or not in the data, a
    snapshot of another data set, embeddings that are not finite, and a column that is missing.
    """
    members = _check_ids(ids, snapshot, columns, head)
    known = snapshot if snapshot is not None and snapshot.seen.any() else None
    affinity = Affinity(known, columns, knobs, derived_seed(seed, version), work)
    groups = _locality_groups(members, columns, knobs.locality, affinity.seed)
    layouts, unseen, start = [], 0, -head.places
    for group in groups:
        shape = BatchShape(len(group), batch_size, -start % batch_size)
        layout, missing = _plan_group(group, affinity, shape)
        layouts.append(layout)
        unseen, start = unseen + missing, start + len(group)
    shape = BatchShape(len(members), batch_size, min(head.places, len(members)))
    layout = join(layouts)
    rules = Rules.of(knobs.unique, columns, head.avoid)
    layout, broken = keep_apart(layout, shape, rules, affinity.seed)
    runs = np.diff(layout.bounds)
    whole = (shape.num_rows - shape.lead) // batch_size * batch_size
    header = PlanHeader(
        format=PLAN_FORMAT, planner_version=PLANNER_VERSION, version=version, seed=seed,
        batch_size=batch_size, lead=shape.lead, asked_step=asked_step,
        knobs=knobs.model_dump(mode="json"), fingerprint=columns.fingerprint,
        snapshot=snapshot.sha256 if snapshot is not None else "",
        num_samples=len(members), num_random=int((runs == 1).sum()), num_unseen=unseen,
        num_clusters=int((runs > 1).sum()), num_torn=layout.torn,
        num_broken=broken, num_left_over=shape.num_rows - shape.lead - whole,
    )  # fmt: skip
    return BatchPlan(layout.order, layout.bounds, header)


def grown_cluster_size(knobs: NegativesConfig, epoch: int) -> int:
    """NGAME's schedule: the cluster size doubles at each epoch of `grow_at`."""
    return knobs.cluster_size * 2 ** sum(epoch >= at for at in knobs.grow_at)


def derived_seed(seed: int, version: int) -> int:
    """The seed of one plan of a run."""
    return int(derive_key(seed, version).view(np.int64)[0])


def _plan_group(ids: Int64s, affinity: Affinity, shape: BatchShape) -> tuple[Layout, int]:
    """(layout, samples without an embedding) of one locality group."""
    seed, knobs = affinity.seed, affinity.knobs
    has_rows = affinity.placeable(ids)
    snapshot = affinity.snapshot
    unseen = len(ids) - (0 if snapshot is None else int(snapshot.seen[ids].sum()))
    is_loose = ~has_rows
    wanted = round(knobs.random_share * len(ids)) - int(is_loose.sum())
    if wanted > 0:
        others = np.flatnonzero(has_rows)
        words = keyed_words(ids[others], seed, _RANDOM_SHARE)
        is_loose[others[np.argsort(words)[:wanted]]] = True
    loose = shuffled(ids[is_loose], seed, SHUFFLE_ROWS)
    return cluster_rows(ids[~is_loose], loose, affinity, shape), unseen


def _check_ids(
    ids: Int64s, snapshot: Snapshot | None, columns: SampleColumns, head: Head
) -> Int64s:  # (n,) ascending
    members = np.sort(np.asarray(ids, np.int64))
    if not len(members):
        raise DataError("a plan of no samples was asked for")
    twice = members[1:][members[1:] == members[:-1]]
    if len(twice):
        raise DataError(f"sample {twice[0]} is to be planned twice: a plan holds each sample once")
    if not 0 <= head.places:
        raise ValueError(f"{head.places} places before the first whole batch")
    total = columns.num_samples or (len(snapshot.rows) if snapshot is not None else None)
    if total is not None and not 0 <= members[0] <= members[-1] < total:
        raise DataError(
            f"samples {members[0]} to {members[-1]} are to be planned, and the data set has "
            f"{total:,}: the ids are of another data set"
        )
    if snapshot is not None:
        if columns.fingerprint:
            check_fingerprint(Path("snapshot"), snapshot.fingerprint, columns.fingerprint)
        if total is not None and len(snapshot.rows) != total:
            raise DataError(
                f"a snapshot of {len(snapshot.rows):,} samples for a data set of {total:,}: it is "
                "of another data set"
            )
    return members


def _locality_groups(
    members: Int64s, columns: SampleColumns, shards: int, seed: int
) -> list[Int64s]:
    """Members cut into groups of so many shards, drawn anew for each plan; 0: one group."""
    if not shards:
        return [members]
    shard = columns.need("shards", "negatives.locality")[members]
    present = shuffled(np.unique(shard), seed, _GROUPS)
    group = np.zeros(int(shard.max()) + 1, np.int64)
    group[present] = np.arange(len(present)) // shards
    numbers = group[shard]
    order = np.argsort(numbers, kind="stable")
    return np.split(members[order], np.flatnonzero(np.diff(numbers[order])) + 1)
