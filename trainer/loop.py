"""The loop over steps: what happens after each one, and when the run stops.

Everything that depends on time is a function of the step; the one exception is a checkpoint every
so many minutes, which rank 0 decides for all.
"""

import json
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch
import torch.distributed as dist

from data.loader import Batch, TrainLoader
from trainer.buffers import average_buffers
from trainer.checkpoint import TrainState, list_steps, step_name
from trainer.config import Config, dump_config
from trainer.duration import Duration
from trainer.ema import WeightAverage
from trainer.engine import Engine
from trainer.events import record_event
from trainer.metrics import MetricsWriter, StepClock, peak_memory_bytes
from trainer.objectives import Model, Objective
from trainer.planning import Planning
from trainer.ranks import Ranks
from trainer.run import write_samples
from trainer.saving import CheckpointFolder
from trainer.schedule import learning_rate
from trainer.spikes import RecentLosses, passed_over
from trainer.step import StepOutput, Stepper
from trainer.stragglers import StragglerWatch
from trainer.validate import Evaluation
from trainer.watch import Progress

COSINES_EVERY_LINES = 20  # a histogram of cosines for so many logged steps

logger = logging.getLogger("nsphere.train")


class TrainingError(RuntimeError):
    """The run cannot go on; the text says why and names the last good checkpoint."""


@dataclass(frozen=True)
class Plan:
    """The run's durations in steps."""

    total_steps: int
    log_every: int
    save_every: int  # 0: by minutes
    save_every_s: float  # inf: by steps
    keep_every: int  # 0: never
    eval_every: int  # 0: at the end only

    @classmethod
    def build(cls, config: Config, epoch_samples: int) -> Self:
        """Turn every duration into steps of this batch and data set."""

        def steps(duration: Duration | None) -> int:
            if duration is None or duration.unit == "minutes":
                return 0
            return duration.to_steps(config.train.global_batch_size, epoch_samples)

        every = config.checkpoint.every
        return cls(
            total_steps=steps(config.train.duration),
            log_every=steps(config.log.every),
            save_every=steps(every),
            save_every_s=every.value * 60 if every.unit == "minutes" else math.inf,
            keep_every=steps(config.checkpoint.keep_every),
            eval_every=steps(config.eval.every),
        )


@dataclass(frozen=True)
class _Agreed:
    """What all ranks know after a step: sums over them."""

    loss: float  # mean over ranks: the global loss
    num_bad: int
    stop: bool
    save: bool  # minutes are over


@dataclass
class Loop:
    """Everything built, ready to run; `run` is called once."""

    config: Config
    run_dir: Path
    ranks: Ranks
    plan: Plan
    model: Model
    engine: Engine
    objective: Objective
    stepper: Stepper
    average: WeightAverage | None
    checkpoints: CheckpointFolder
    writer: MetricsWriter
    validation: Evaluation | None
    epoch_samples: int
    clock: StepClock
    progress: Progress
    load: Callable[[Path], TrainState]  # everything as a checkpoint has it
    stragglers: StragglerWatch
    planning: Planning | None = None
    _last_save: float = 0.0
    _saved_step: int = 0
    _num_rollbacks: int = 0

    def run(self, loader: TrainLoader, state: TrainState, stop: Callable[[], bool]) -> TrainState:
        """Train from `state` to the end, or to the step at which some rank was asked to stop."""
        self._last_save = time.monotonic()
        self._saved_step = state.step
        if self.planning is not None:
            with self.progress.long("plan"):
                self.planning.begin(self.engine.forward_model(), state.step)
        stopped = False
        while state.step < self.plan.total_steps and not stopped:  # once, and after each going back
            self.clock.restart()
            state, stopped = self._run_on(loader, state, stop)
        with self.progress.long("save"):
            if state.step != self._saved_step:
                self._save(state)
            self.checkpoints.wait()
        return state

    def _run_on(
        self, loader: TrainLoader, state: TrainState, stop: Callable[[], bool]
    ) -> tuple[TrainState, bool]:
        """Steps until the end, a stop (True), or a spike, after which `state` is an earlier one."""
        for batch in loader.batches(state.step, self.plan.total_steps - state.step):
            self.clock.mark("data_wait")
            if state.step in state.passed_over:
                agreed = self._agree(0.0, batch, stop)
                state = self._pass_over(state, agreed)
            else:
                output = self.stepper(batch, state.step, self._learning_rate(state))
                agreed = self._agree(float(output.loss), batch, stop)
                recent = RecentLosses(self.config.spikes, tuple(state.recent_losses))
                if recent.has_spike(agreed.loss):
                    return self._go_back(state, agreed.loss), False
                state = self._advance(state, output, agreed, recent)
                self._plan_ahead(state, batch, output)
                self._record(state, batch, output, agreed)
            self.progress.reached(state.step)
            if self.checkpoints.poll():
                self.clock.mark("checkpoint")
            self._do_what_is_due(state, agreed)
            if agreed.stop:
                return state, True
        return state, False

    def _do_what_is_due(self, state: TrainState, agreed: _Agreed) -> None:
        last = state.step == self.plan.total_steps
        if last or _is_due(state.step, self.plan.eval_every):
            with self.progress.long("evaluation"):
                self._evaluate(state)
        if last or agreed.stop or agreed.save or _is_due(state.step, self.plan.save_every):
            with self.progress.long("save"):
                self._save(state)
            self._saved_step = state.step

    def _plan_ahead(self, state: TrainState, batch: Batch, output: StepOutput) -> None:
        if self.planning is not None:
            with self.progress.long("plan"):
                module = self.engine.forward_model()
                self.planning.after_step(module, state.step, batch, output)
            self.clock.mark("planning")

    def _learning_rate(self, state: TrainState) -> float:
        batch = self.config.train.global_batch_size
        return self.config.optim.lr * learning_rate(
            self.config.schedule,
            state.samples_seen,
            self.plan.total_steps * batch,
            global_batch_size=batch,
            epoch_samples=self.epoch_samples,
        )

    def _agree(self, loss: float, batch: Batch, stop: Callable[[], bool]) -> _Agreed:
        """One small reduction a step: whatever any rank saw, all ranks act on together."""
        over = time.monotonic() - self._last_save > self.plan.save_every_s
        numbers = torch.tensor(
            [loss, batch.num_bad, stop(), over and self.ranks.is_first],
            dtype=torch.float64,
            device=self.ranks.device,
        )
        dist.all_reduce(numbers, group=self.ranks.group)
        total, num_bad, stops, saves = numbers.tolist()
        return _Agreed(total / self.ranks.world_size, int(num_bad), stops > 0, saves > 0)

    def _advance(
        self, state: TrainState, output: StepOutput, agreed: _Agreed, recent: RecentLosses
    ) -> TrainState:
        batch = self.config.train.global_batch_size
        applied, rescaled = output.result.applied, output.result.rescaled
        state = replace(
            state,
            step=state.step + 1,
            samples_seen=state.samples_seen + batch,
            bad_samples=state.bad_samples + agreed.num_bad,
            skipped_steps=state.skipped_steps + (not applied),
            skipped_in_row=0 if applied or rescaled else state.skipped_in_row + 1,
            recent_losses=list(recent.and_then(agreed.loss).losses if applied else recent.losses),
        )
        if applied:
            if self.average is not None:
                self.average.update(state.step)
        elif rescaled:
            logger.info("step %d skipped to lower fp16's loss scale", state.step)
        else:
            logger.warning(
                "step %d skipped: loss %s, a gradient was not finite", state.step, agreed.loss
            )
        self._check_skipped(state)
        return state

    def _pass_over(self, state: TrainState, agreed: _Agreed) -> TrainState:
        """A step without an update: its batch was part of a spike."""
        logger.info("step %d passed over, because of a spike", state.step + 1)
        return replace(
            state,
            step=state.step + 1,
            samples_seen=state.samples_seen + self.config.train.global_batch_size,
            bad_samples=state.bad_samples + agreed.num_bad,
            skipped_steps=state.skipped_steps + 1,
        )

    def _go_back(self, state: TrainState, loss: float) -> TrainState:
        """To the newest checkpoint from before the batches that will be passed over.

        Raises TrainingError where there is none, or after `spikes.max_rollbacks` of these.
        """
        spikes, spike = self.config.spikes, state.step
        doomed = passed_over(spike, spikes.skip, state.passed_over)
        first = next(step for step in doomed if step > spike - spikes.skip)
        told = (
            f"step {spike + 1}: loss {loss:.4g} is a spike (spikes.threshold = {spikes.threshold:g}"
            f" typical deviations above the median of the last {spikes.window})"
        )
        self._num_rollbacks += 1
        if self._num_rollbacks > spikes.max_rollbacks:
            raise TrainingError(
                f"{told}, and {spikes.max_rollbacks} times this run went back already "
                "(spikes.max_rollbacks): lower optim.lr, or raise spikes.threshold"
            )
        found = self.checkpoints.newest_before(first)
        if found is None:
            raise TrainingError(
                f"{told}, and no checkpoint is from before step {first}: save more often "
                "(checkpoint.every, checkpoint.keep_last), or set spikes.threshold = 0"
            )
        with self.progress.long("going back"):
            old = self.load(found)
            self.checkpoints.forget_after(old.step)  # a restart must not take them for this run's
        self.writer.rewind(old.step)
        self._saved_step = old.step
        logger.warning("%s: back to step %d, passing over %d batches", told, old.step, len(doomed))
        if self.ranks.is_first:
            details = {"step": spike + 1, "to_step": old.step, "loss": loss}
            record_event(self.run_dir, "rollback", {**details, "skipped": list(doomed)})
        return replace(old, passed_over=list(doomed))

    def _check_skipped(self, state: TrainState) -> None:
        if state.skipped_in_row > self.config.train.max_skipped:
            raise TrainingError(
                f"step {state.step}: {state.skipped_in_row} steps in a row had a loss or gradient "
                f"that was not finite (train.max_skipped = {self.config.train.max_skipped}); "
                f"last good checkpoint: {self._last_checkpoint()}; lower optim.lr, set "
                "optim.clip_norm, or look at the samples of these steps with log.samples = true"
            )

    def _last_checkpoint(self) -> str:
        steps = list_steps(self.checkpoints.folder)
        return str(self.checkpoints.folder / step_name(steps[-1])) if steps else "none"

    def _record(self, state: TrainState, batch: Batch, output: StepOutput, agreed: _Agreed) -> None:
        if self.config.log.samples:
            self._record_samples(state, batch)
        self.clock.mark("log")
        if not (_is_due(state.step, self.plan.log_every) or state.step == self.plan.total_steps):
            return
        seconds = self.clock.drain(self.plan.log_every)
        seconds |= self.stragglers.observe(state.step, seconds, self.plan.log_every)
        batch_size = self.config.train.global_batch_size
        values: dict[str, Any] = {
            "epoch": state.samples_seen / self.epoch_samples,
            "loss": agreed.loss,
            "lr": self._learning_rate(replace(state, samples_seen=state.samples_seen - batch_size)),
            "grad_norm": output.result.grad_norm,
            "samples_per_s": batch_size / seconds["step_s"],
            "peak_memory_bytes": peak_memory_bytes(self.ranks.device),
            "bad_samples": state.bad_samples,
            "skipped_steps": state.skipped_steps,
            **self.objective.numbers(output.outputs),
            **seconds,
        }
        if self.planning is not None:
            self.planning.observe(state.step, values)
            values |= self.planning.numbers(state.step)
        self.writer.write_step(state.step, state.samples_seen, values)
        num_lines = state.step // self.plan.log_every
        if num_lines % COSINES_EVERY_LINES == 1 or state.step == self.plan.total_steps:
            self._record_cosines(state, batch, output)

    def _record_samples(self, state: TrainState, batch: Batch) -> None:
        rows: list[Any] = [None] * self.ranks.world_size
        here = list(zip(batch.positions.tolist(), batch.keys, strict=True))
        dist.gather_object(here, rows if self.ranks.is_first else None, group=self.ranks.group)
        if self.ranks.is_first:
            keys = [key for _, key in sorted(row for part in rows for row in part)]
            write_samples(self.run_dir, state.step, keys)

    def _record_cosines(self, state: TrainState, batch: Batch, output: StepOutput) -> None:
        counts = self.objective.histograms(output.outputs, batch)
        if counts is not None:
            self.writer.write_cosines(state.step, state.samples_seen, counts)

    def _evaluate(self, state: TrainState) -> None:
        if self.validation is None:
            return
        if self.average is not None:
            self.average.swap()
        average_buffers(self.model, self.ranks)
        results = self.validation(self.engine.forward_model())
        if self.average is not None:
            self.average.swap()
        self.writer.write_evaluation(state.step, state.samples_seen, results)
        self.clock.restart()

    def _save(self, state: TrainState) -> None:
        average_buffers(self.model, self.ranks)
        files: dict[str, Any] = {**self.engine.files(), **self.objective.files()}
        if self.planning is not None:
            self.planning.before_save(state.step)
            files |= self.planning.files(state.step)
            state = replace(state, planning=self.planning.state())
        averages = self.average.whole() if self.average is not None else None
        if self.ranks.is_first:
            if averages is not None:
                files["ema.safetensors"] = averages
            model = self.config.model.name
            if model.endswith(".json"):
                files["model.json"] = json.loads(Path(model).read_text())
        state = replace(state, engine=self.engine.state())
        self.checkpoints.save(state, dump_config(self.config), files)
        if self.planning is not None:
            self.planning.after_save(self.checkpoints.folder)
        self._last_save = time.monotonic()
        self.clock.mark("checkpoint")


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
