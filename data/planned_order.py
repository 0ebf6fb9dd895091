"""The order of a run with planned batches: the stream of positions cut into segments.

A segment [start, stop) of positions takes its samples from a stored plan (`data/negatives`), or,
where no plan is named, from the plain order (`data/order.py`). Each epoch, N positions from a
multiple of N on, holds each of N samples once: a plan that begins inside an epoch is of the samples
that the epoch has not seen yet. The table of segments is all there is to the order; it is a few
numbers a plan, lies in every checkpoint, and only ever grows at its end.
"""

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data.errors import DataError
from data.negatives.plan import BatchPlan, Head
from data.order import BatchOf, Order

Int64s = NDArray[np.int64]
ENDLESS = 1 << 62
"""Stop of a segment that goes on for ever."""
_OPEN_PLANS = 3


class Segment(NamedTuple):
    """Positions [start, stop), inside one epoch unless they are in the plain order."""

    start: int
    stop: int
    plan: str = ""
    """Folder of the plan below RUN/plans; empty: the plain order."""
    sha256: str = ""
    offset: int = 0
    """Place in the plan that `start` takes."""
    asked_step: int = -1
    """Steps done when its embeddings were taken."""
    version: int = -1
    """Number of the plan in the run."""


class PlannedOrder:
    """Position -> sample by the segments known so far."""

    def __init__(self, order: Order, fingerprint: str) -> None:
        self.order = order
        self.num_samples = order.num_samples
        self.fingerprint = fingerprint
        """Of the data set."""
        self.folder = Path()
        """Of the plans."""
        self.segments: tuple[Segment, ...] = (Segment(0, ENDLESS),)
        self._plans: OrderedDict[tuple[str, str], BatchPlan] = OrderedDict()

    @property
    def end(self) -> int:
        """Positions below it are decided."""
        return self.segments[-1].stop if self.segments else 0

    def start(
        self,
        folder: Path,
        segments: Iterable[Segment],
        *,
        position: int = 0,  # plans of epochs before it are not looked at
    ) -> None:
        """Take over a run's plans; DataError where one is torn, missing, or of other data."""
        self.folder, self.segments = folder, ()
        first = position // self.num_samples * self.num_samples
        for segment in segments:
            self.append(segment, check=segment.stop > first)

    def append(self, segment: Segment, *, check: bool = True) -> None:
        """Decide the positions from the end on. Raises DataError where the plan does not fit."""
        if segment.start != self.end or segment.stop <= segment.start:
            raise DataError(f"{self.folder}: {segment} does not begin at {self.end}")
        if segment.plan and check:
            self._check(segment)
        self.segments = (*self.segments, segment)

    def between(self, start: int, stop: int) -> tuple[Segment, ...]:
        """The segments that hold positions [start, stop); all of those must be decided."""
        if stop > self.end:
            raise ValueError(f"positions below {stop} are asked for, {self.end} are decided")
        return tuple(part for part in self.segments if part.start < stop and start < part.stop)

    def ids(
        self,
        positions: Int64s,  # (n,) in any order
        batch_of: BatchOf,
        segments: Sequence[Segment] = (),  # that hold them; none: look among all
    ) -> tuple[Int64s, Int64s]:  # (n,) epochs, (n,) ids
        """Epoch and sample of each position."""
        ids = np.empty_like(positions)
        for part in segments or self.segments:
            mine = (positions >= part.start) & (positions < part.stop)
            if not mine.any():
                continue
            if part.plan:
                places = positions[mine] - (part.start - part.offset)
                ids[mine] = self.plan(part).order[places]
            else:
                ids[mine] = self.order.ids(positions[mine], batch_of)[1]
        return positions // self.num_samples, ids

    def rest(self, position: int, batch_of: BatchOf) -> Int64s:
        """Samples that the epoch of `position`, at most the end, has not seen before it; sorted."""
        start = position // self.num_samples * self.num_samples
        if position == start:
            return np.arange(self.num_samples)
        seen = np.zeros(self.num_samples, np.bool_)
        seen[self.ids(np.arange(start, position), batch_of)[1]] = True
        return np.flatnonzero(~seen)

    def head(self, position: int, batch_of: BatchOf) -> Head:
        """Of a plan from `position` on: the places it fills of a batch that others began."""
        start, stop = batch_of(position)
        if position == start:
            return Head()
        return Head(stop - position, self.ids(np.arange(start, position), batch_of)[1])

    def clusters_of(
        self,
        positions: Int64s,  # (n,)
    ) -> Int64s:  # (n,)
        """Where the cluster that each position is of begins, -1 in the plain order."""
        numbers = np.full(len(positions), -1, np.int64)
        if not len(positions):
            return numbers
        for part in self.between(int(positions.min()), int(positions.max()) + 1):
            mine = (positions >= part.start) & (positions < part.stop)
            if part.plan:
                first, plan = part.start - part.offset, self.plan(part)
                clusters = plan.clusters_at(positions[mine] - first)
                numbers[mine] = first + plan.bounds[clusters]
        return numbers

    def negatives_of(
        self,
        positions: Int64s,  # (n,)
    ) -> Int64s:  # (n, h)
        """Samples that stand by each position's own as explicit negatives; -1: none, or no more."""
        found = np.full((len(positions), 0), -1, np.int64)
        for plan, mine, places in self._in_plans(positions):
            if plan.negatives is None:
                continue
            more = plan.negatives.shape[1] - found.shape[1]
            found = np.pad(found, ((0, 0), (0, max(0, more))), constant_values=-1)
            found[mine, : plan.negatives.shape[1]] = plan.negatives[places]
        return found

    def weights_of(
        self,
        positions: Int64s,  # (n,)
    ) -> NDArray[np.float32]:  # (n,)
        """What the loss of each position's sample is multiplied by; 1 where no plan says it."""
        weights = np.ones(len(positions), np.float32)
        for plan, mine, places in self._in_plans(positions):
            if plan.row_weights is not None:
                weights[mine] = plan.row_weights[places]
        return weights

    def _in_plans(
        self, positions: Int64s
    ) -> Iterator[tuple[BatchPlan, NDArray[np.bool_], Int64s]]:  # which positions, their places
        """Each plan that some of the positions are of."""
        if not len(positions):
            return
        for part in self.between(int(positions.min()), int(positions.max()) + 1):
            mine = (positions >= part.start) & (positions < part.stop)
            if part.plan and mine.any():
                yield self.plan(part), mine, positions[mine] - (part.start - part.offset)

    def plan(self, segment: Segment) -> BatchPlan:
        """The plan of a segment; its arrays stay in the file."""
        key = (segment.plan, segment.sha256)
        if key not in self._plans:
            if len(self._plans) >= _OPEN_PLANS:
                self._plans.popitem(last=False)
            self._plans[key] = self._open(segment)
        self._plans.move_to_end(key)
        return self._plans[key]

    def _open(self, segment: Segment, *, verify: bool = False) -> BatchPlan:
        return BatchPlan.load(
            self.folder / segment.plan, self.fingerprint, segment.sha256, verify=verify
        )

    def _check(self, segment: Segment) -> None:
        places = len(self._open(segment, verify=True).order) - segment.offset
        epoch_end = (segment.start // self.num_samples + 1) * self.num_samples
        if places != epoch_end - segment.start or segment.stop > epoch_end:
            raise DataError(
                f"{self.folder / segment.plan}: has {places:,} samples from place "
                f"{segment.offset:,} on, and {epoch_end - segment.start:,} are left in the epoch"
            )

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_plans": OrderedDict()}
