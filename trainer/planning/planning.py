"""Planning while training: what a run with planned batches does after each step.

Embeddings of the step go to the store (`feed.py`). When a plan is asked for (`schedule.py`), rank 0
takes a copy of the store and makes the plan beside training (`background.py`, `maker.py`). On all
ranks at once it becomes part of the order (`data/planned_order.py`), before the loader needs it: a
batch of a plan that is not there yet is never asked for. Which decision fell where is in the table
of segments, which every checkpoint holds with the store's rows (`stored.py`); a save waits for the
plan under way. So a run that goes on from a checkpoint has the same batches, of the same files;
those that no checkpoint needs are removed after a save (`prune.py`).
"""

import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from data.config import NegativesConfig
from data.dataset import SampleSet
from data.errors import DataError
from data.loader import Batch
from data.negatives.columns import load_columns
from data.negatives.plan import BatchPlan, PlanHeader, grown_cluster_size
from data.order import equal_batches
from data.planned_order import ENDLESS, PlannedOrder, Segment
from trainer.config import Config, ConfigError
from trainer.hardness import ClustersOf, Control, decide
from trainer.objectives import Model
from trainer.planning.background import Job
from trainer.planning.feed import Feed
from trainer.planning.maker import PlanMaker, Request
from trainer.planning.prune import needed_segments, remove_old_plans
from trainer.planning.schedule import Schedule, Switch
from trainer.planning.stored import plan_files, restore_plans
from trainer.ranks import Ranks
from trainer.step import StepOutput

T = TypeVar("T")
_POLL_S = 10.0  # that the other ranks wait for one word of the first
_VISIBLE_S = 60.0  # after which a folder that rank 0 wrote must be seen by every node

logger = logging.getLogger("nsphere.planning")


class Planning:
    """The plans of one run; every rank holds one and calls it together with the others."""

    def __init__(
        self,
        config: Config,
        run: Path,
        samples: SampleSet,
        planned: PlannedOrder,
        model: Model,
        ranks: Ranks,
        *,
        total_steps: int,
        autocast: torch.dtype | None,
    ) -> None:
        """Raises ConfigError for durations and sides that cannot be."""
        self._config, self._ranks = config, ranks
        self._negatives: NegativesConfig = config.negatives
        self._samples, self._planned = samples, planned
        self._batch_size = config.train.global_batch_size
        self._batch_of = equal_batches(self._batch_size)
        self._total = total_steps * self._batch_size
        self._folder = run / "plans"
        self._schedule = Schedule.build(
            config.negatives,
            batch_size=self._batch_size,
            num_samples=samples.num_samples,
            total_steps=total_steps,
        )
        self._lookahead = config.data.workers * config.data.prefetch + 1
        self._feed = Feed(config, run / "store", samples, model, ranks, autocast=autocast)
        self._maker: PlanMaker | None = None
        self._job: Job[PlanHeader] | None = None
        self._under_way: Switch | None = None
        self._control: Control | None = None
        if config.negatives.controller:
            if config.negatives.grow_at:
                raise ConfigError(
                    "negatives.controller and negatives.grow_at both set the cluster size: leave "
                    "one out"
                )
            self._control = Control(config.negatives.cluster_size)
        self._numbers: dict[str, float] = {}
        self._wait_s = 0.0

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds beside the files: plain values, equal on all ranks."""
        control = {} if self._control is None else self._control.to_json()
        return {"segments": self._planned.segments, "control": control}

    def load(self, checkpoint: Path | None, state: Mapping[str, Any], position: int) -> None:
        """Take over what a checkpoint has; None: begin.

        Raises DataError and ConfigError for plans and a store that are damaged or of other data.
        """
        first = self._schedule.first if self._schedule.switches else ENDLESS
        table = [Segment(0, first)] if first else []
        if checkpoint is not None:
            table = [Segment(*segment) for segment in state["segments"]]
            if self._control is not None:
                self._control = Control.from_json(state["control"])
            self._from_first(lambda: restore_plans(checkpoint, self._folder))
        self._planned.start(self._folder, table, position=position)
        if not self._schedule.switches:
            return
        self._from_first(lambda: self._open_maker(checkpoint))

    def _open_maker(self, checkpoint: Path | None) -> None:
        """Rank 0 alone has the store, and makes plans."""
        self._feed.load(checkpoint)
        self._folder.mkdir(parents=True, exist_ok=True)
        self._maker = PlanMaker(
            self._folder,
            self._config.train.seed,
            self._batch_size,
            load_columns(
                self._samples,
                self._negatives,
                images_per_identity=self._config.data.images_per_identity,
                has_lists=self._config.has_labels,
            ),
            self._samples.fingerprint,
        )

    def begin(self, module: nn.Module, step: int) -> None:
        """Before the first batch of this life: `step` steps are done."""
        self._advance(module, step)
        self._settle(step, wait=True)  # the loader's workers are forked next: no thread is at work

    def after_step(self, module: nn.Module, step: int, batch: Batch, output: StepOutput) -> None:
        """`step` steps are done, the last of this batch."""
        if self._schedule.switches:
            self._feed.write_step(step, batch, output)
            self._advance(module, step)

    def before_save(self, step: int) -> None:
        """Wait for the plan under way, so that the checkpoint knows it."""
        self._settle(step, wait=True)

    def files(self, step: int) -> dict[str, Any]:
        """This rank's files of a checkpoint after `step` steps."""
        if self._maker is None:
            return self._feed.files()
        planned, position = self._planned, step * self._batch_size
        needed = needed_segments(planned.segments, position, planned.num_samples)
        plans = {segment.plan: planned.plan(segment) for segment in needed}
        return self._feed.files() | plan_files(plans, later=self._config.checkpoint.background)

    def after_save(self, checkpoints: Path) -> None:
        """Plans that none of the checkpoints needs any more go."""
        if self._maker is None:
            return
        try:
            remove_old_plans(self._folder, checkpoints, self._samples.num_samples)
        except OSError as error:
            logger.warning("plans that are needed no more stay until the next save: %s", error)

    def observe(self, step: int, numbers: Mapping[str, float]) -> None:
        """How hard a logged step was, for the controller; equal numbers on all ranks."""
        if self._control is not None:
            segment = self._segment_of(step)
            size = self._cluster_size(segment) if segment.plan else 1
            self._control = self._control.observe(numbers, size)

    def _segment_of(self, step: int) -> Segment:
        """That the last sample of the `step`-th batch is of."""
        position = step * self._batch_size - 1
        return self._planned.between(position, position + 1)[0]

    def _cluster_size(self, segment: Segment) -> int:
        return int(self._planned.plan(segment).header.knobs["cluster_size"])

    def numbers(self, step: int) -> dict[str, float]:
        """For people, on rank 0, of a step that is done; means and sums since the last call."""
        if self._maker is None:
            return {}
        segment = self._segment_of(step)
        numbers = {
            "plan_version": segment.version,
            "plan_wait_s": self._wait_s,
            **self._feed.numbers(step),
            **self._numbers,
        }
        if segment.plan:
            numbers["cluster_size"] = self._cluster_size(segment)
            numbers["plan_age"] = step - segment.asked_step
            numbers["plan_lag"] = segment.start // self._batch_size - segment.asked_step
        self._wait_s, self._numbers = 0.0, {}
        return numbers

    def _advance(self, module: nn.Module, step: int) -> None:
        self._settle(step)
        while self._ask(module, step):
            self._settle(step)

    def _settle(self, step: int, *, wait: bool = False) -> None:
        """Decide what the next batches need, or what is ready."""
        needed = min((step + 1) * self._batch_size, self._total)
        if self._under_way is not None:
            must = wait or (self._negatives.strict and self._planned.end < needed)
            if self._is_ready(must=must):
                self._adopt(self._under_way)
        if not self._negatives.strict:
            wanted = min((step + 1 + self._lookahead) * self._batch_size, self._total)
            while self._planned.end < wanted and self._under_way is not None:
                self._go_on(wanted)

    def _ask(self, module: nn.Module, step: int) -> bool:
        """Begin the next plan if it is due; every rank comes to the same answer."""
        switch = self._next_switch()
        if self._under_way is not None or switch is None or step < switch.asked_step:
            return False
        if self._control is not None and switch.fresh:
            decision, self._control = decide(
                self._control, band=self._negatives.band, batch_size=self._batch_size
            )
            logger.info("%s: %s", switch.name, decision)
        start = max(switch.start, self._planned.end)  # later than meant only if not strict
        switch = switch._replace(start=start)
        request = self._request(switch) if self._ranks.is_first else None
        if switch.fresh and (self._negatives.refresh_pass or self._is_cold(switch)):
            maker = self._maker  # an earlier life may have made the plan from its own pass
            made = maker is not None and request is not None and maker.find(request) is not None
            self._feed.embed_all(module, step, needed=not self._tell(made))
        self._under_way = switch
        if request is not None and self._maker is not None:
            snapshot = self._feed.snapshot() if switch.fresh else None
            maker = self._maker
            self._job = Job(lambda: maker.make(request, snapshot))
        return True

    def _is_cold(self, switch: Switch) -> bool:
        """The run's very first batch is to be planned, and nothing has been embedded."""
        return switch.start == 0 and self._negatives.planner != "coordinates"

    def _next_switch(self) -> Switch | None:
        last = max((segment.version for segment in self._planned.segments), default=-1)
        for switch in self._schedule.switches[last + 1 :]:
            if switch.stop > self._planned.end:
                return switch
        return None

    def _request(self, switch: Switch) -> Request:
        planned, start = self._planned, switch.start
        base = None if switch.fresh else self._last_plan()
        if base is not None:
            knobs = NegativesConfig.model_validate(base.header.knobs)
        else:
            size = grown_cluster_size(self._negatives, switch.epoch)
            if self._control is not None:
                size = self._control.cluster_size
            knobs = self._negatives.model_copy(update={"cluster_size": size})
        return Request(
            name=switch.name,
            version=switch.version,
            asked_step=switch.asked_step,
            ids=planned.rest(start, self._batch_of),
            head=planned.head(start, self._batch_of),
            knobs=knobs,
            base=base,
        )

    def _last_segment(self) -> Segment | None:
        planned = (segment for segment in reversed(self._planned.segments) if segment.plan)
        return next(planned, None)

    def _last_plan(self) -> BatchPlan | None:
        segment = self._last_segment()
        if segment is None:
            return None
        return BatchPlan.load(self._folder / segment.plan, self._samples.fingerprint)

    def _is_ready(self, *, must: bool) -> bool:
        """Whether rank 0 has the plan under way; `must` waits until it has."""
        started = time.monotonic()
        while True:
            done = self._job is not None and self._job.is_done(_POLL_S if must else 0.0)
            flag = torch.tensor([done], dtype=torch.int64, device=self._ranks.device)
            if self._ranks.world_size > 1:
                dist.broadcast(flag, src=0, group=self._ranks.group)
            if flag.item():
                break
            if not must:
                return False
        self._wait_s += time.monotonic() - started
        return True

    def _adopt(self, switch: Switch) -> None:
        """The plan that is ready begins where the order ends."""
        start = self._planned.end
        segment = Segment(
            start, self._stop_after(start), switch.name,
            asked_step=switch.asked_step, version=switch.version,
        )  # fmt: skip
        if not switch.fresh and (before := self._last_segment()) is not None:
            segment = segment._replace(asked_step=before.asked_step)
        self._append(segment, lambda: self._collect(switch, start))
        self._under_way, self._job = None, None
        size = self._cluster_size(self._planned.segments[-1])
        if self._control is not None and size != self._control.cluster_size:
            self._control = Control(size)  # as an earlier life of the run had decided

    def _collect(self, switch: Switch, start: int) -> tuple[str, str]:
        """(name, SHA-256) of the plan under way, of what is left of it if it comes late."""
        if self._job is None or self._maker is None:
            raise RuntimeError("no plan is under way on the first rank")
        header = self._job.result()
        self._numbers["plan_make_s"] = self._job.seconds
        if start == switch.start:
            return switch.name, header.sha256
        return self._again(switch.name, switch, start)

    def _go_on(self, wanted: int) -> None:
        """The plan under way is late: a few more batches from the old one.

        Where an epoch ends its clusters are shuffled; without any plan yet, in the plain order.
        """
        planned = self._planned
        last, start = planned.segments[-1], planned.end
        epoch_end = (start // planned.num_samples + 1) * planned.num_samples
        stop = min(epoch_end, wanted)
        if start % planned.num_samples or not last.plan:
            offset = last.offset + start - last.start if last.plan else 0
            segment = last._replace(start=start, stop=stop, offset=offset)
            planned.append(segment, check=False)
            return
        segment = last._replace(start=start, stop=stop, offset=0)
        old = Switch(last.version, start, stop, 0, last.asked_step, fresh=False)
        self._append(segment, lambda: self._again(last.plan, old, start))

    def _again(self, name: str, switch: Switch, start: int) -> tuple[str, str]:
        """A stored plan's clusters, for what the epoch has left from `start` on."""
        if self._maker is None:
            raise RuntimeError("plans are made on the first rank")
        base = BatchPlan.load(self._folder / name, self._samples.fingerprint)
        again = f"{switch.name}-from-{start}"
        request = Request(
            name=again,
            version=switch.version,
            asked_step=base.header.asked_step,
            ids=self._planned.rest(start, self._batch_of),
            head=self._planned.head(start, self._batch_of),
            knobs=NegativesConfig.model_validate(base.header.knobs),
            base=base,
            salt=start,
        )
        return again, self._maker.make(request, None).sha256

    def _append(self, segment: Segment, find: Callable[[], tuple[str, str]]) -> None:
        """Let all ranks go on with a plan that rank 0 finds."""
        name, sha256 = self._from_first(find)
        _wait_for(self._folder / name)
        self._planned.append(segment._replace(plan=name, sha256=sha256))
        logger.info("positions %d to %d: %s", segment.start, segment.stop, name)

    def _stop_after(self, position: int) -> int:
        """Where the next plan is meant to begin."""
        return next(switch.stop for switch in self._schedule.switches if switch.stop > position)

    def _from_first(self, find: Callable[[], T]) -> T:
        """What the first rank finds; what it raises all raise. Collective."""
        found: T | None = None
        problem: Exception | None = None
        if self._ranks.is_first:
            try:
                found = find()
            except (ConfigError, DataError) as error:
                problem = error
            except OSError as error:
                problem = DataError(str(error))
        found, problem = self._tell((found, problem))
        if problem is not None:
            raise problem
        return cast(T, found)

    def _tell(self, word: Any) -> Any:
        """What the first rank says; collective."""
        if self._ranks.world_size == 1:
            return word
        words = [word]
        dist.broadcast_object_list(words, src=0, group=self._ranks.group)
        return words[0]


def clusters_of(planned: PlannedOrder | None) -> ClustersOf | None:
    """The clusters of positions, for numbers about hardness; None without planned batches."""
    if planned is None:
        return None

    def of(positions: Tensor) -> Tensor | None:
        found = planned.clusters_of(positions.numpy())
        return torch.from_numpy(found) if (found >= 0).any() else None

    return of


def _wait_for(folder: Path) -> None:
    """A file system may show another node's folder late."""
    deadline = time.monotonic() + _VISIBLE_S
    while not folder.is_dir() and time.monotonic() < deadline:
        time.sleep(0.1)
