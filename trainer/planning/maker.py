"""Plans on the disk: made once by rank 0, found again by whoever needs the same one.

A plan is a function of the store, and the store of the embeddings that training wrote. A run that
was killed and repeats its steps at the same world size would make the same plan again; at another
world size its embeddings differ by rounding, and so would the plan. Neither happens where the plan
is on the disk already: it is taken. Plans that come later at another world size follow from
embeddings which differ by rounding, and may hold other clusters.
"""

import logging
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data.config import NegativesConfig
from data.errors import DataError
from data.negatives.columns import SampleColumns
from data.negatives.mining import attach, mine_negatives
from data.negatives.plan import BatchPlan, Head, PlanHeader, make_plan
from data.negatives.reshuffle import reshuffle_plan
from data.negatives.store import Snapshot
from data.negatives.tree import Work

Int64s = NDArray[np.int64]

_MOST_THREADS, _CORES_A_THREAD = 8, 4  # the machine is training meanwhile

logger = logging.getLogger("nsphere.planning")


@dataclass(frozen=True)
class Request:
    """What a plan is to be made of; everything but the embeddings."""

    name: str
    version: int
    asked_step: int
    ids: Int64s  # (n,) rising
    head: Head
    knobs: NegativesConfig
    base: BatchPlan | None = None
    """Its clusters are shuffled; None: new ones are made."""
    salt: int = 0


@dataclass(frozen=True)
class PlanMaker:
    """Makes plans of one run's samples, or finds them."""

    folder: Path  # RUN/plans
    seed: int
    batch_size: int
    columns: SampleColumns
    fingerprint: str

    def find(self, request: Request) -> PlanHeader | None:
        """The plan of an earlier life of this run that is just what is asked for, if it is there.

        One that is torn, or that other steps have led to, is passed over and made anew.
        """
        folder = self.folder / request.name
        if not folder.is_dir():
            return None
        try:
            plan = BatchPlan.load(folder, self.fingerprint)
        except DataError as error:
            logger.warning("a plan is made anew: %s", error)
            return None
        lead = min(request.head.places, len(request.ids))
        same = (
            plan.header.version == request.version
            and plan.header.asked_step == request.asked_step
            and plan.header.seed == self.seed
            and plan.header.batch_size == self.batch_size
            and plan.header.lead == lead
            and self._knobs_agree(plan.header, request)
            and np.array_equal(np.sort(plan.order), request.ids)
            and not np.isin(plan.order[:lead], request.head.avoid).any()
        )
        return plan.header if same else None

    def _knobs_agree(self, header: PlanHeader, request: Request) -> bool:
        """The controller's decision may have fallen otherwise at another world size: it is kept."""
        free = {"cluster_size"} if request.knobs.controller else set()
        wanted = request.knobs.model_dump(mode="json", exclude=free)
        return {key: value for key, value in header.knobs.items() if key not in free} == wanted

    def make(self, request: Request, snapshot: Snapshot | None) -> PlanHeader:
        """Find the plan or make and store it."""
        found = self.find(request)
        if found is not None:
            return found
        plan = self._make(request, snapshot)
        if self.columns.weights is not None:
            plan = attach(plan, row_weights=self.columns.weights[plan.order])
        return plan.save(self.folder / request.name).header

    def _make(self, request: Request, snapshot: Snapshot | None) -> BatchPlan:
        if request.base is not None:
            return reshuffle_plan(
                request.base,
                request.ids,
                version=request.version,
                asked_step=request.asked_step,
                salt=request.salt,
                head=request.head,
                columns=self.columns,
            )
        work = Work(max(1, min(_MOST_THREADS, (os.cpu_count() or 1) // _CORES_A_THREAD)))
        plan = make_plan(
            snapshot,
            request.ids,
            request.knobs,
            seed=self.seed,
            version=request.version,
            batch_size=self.batch_size,
            asked_step=request.asked_step,
            head=request.head,
            columns=self.columns,
            work=work,
        )
        if not request.knobs.explicit or snapshot is None:
            return plan
        negatives = mine_negatives(
            plan,
            snapshot,
            request.knobs.explicit,
            skip=request.knobs.skip_nearest,
            labels=self.columns.lists,
            work=work,
        )
        return attach(plan, negatives=negatives)
