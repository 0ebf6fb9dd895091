"""`train(config, run, ranks)`: builds everything in order, then the loop. Read it first.

index -> order -> towers -> optimizer -> engine -> checkpoint -> loader -> loop (`trainer/loop.py`),
which calls the step (`trainer/step.py`), which calls towers and loss.
"""

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from data.augment import ImageTransform
from data.dataset import SampleSet
from data.loader import TrainLoader
from trainer.checkpoint import TrainState, load_averages, load_state, portable
from trainer.config import Config, ConfigError
from trainer.dropout import make_dropout_keyed
from trainer.ema import WeightAverage
from trainer.engine import Engine
from trainer.life import failure_recorded, record_end, record_start
from trainer.lock import RunLock
from trainer.loop import Loop, Plan
from trainer.metrics import MetricsWriter, StepClock
from trainer.models.batch_norm import make_batch_norm_global
from trainer.objectives import Model, Objective, build_model, build_objective
from trainer.optim import build_optimizer, parameter_groups
from trainer.planning import Planning, clusters_of
from trainer.precision import AUTOCAST, autocast_dtype
from trainer.ranks import Ranks
from trainer.run import check_remote_config, log_to_file, open_run_together, remote_of
from trainer.samples import check_fit, load_samples
from trainer.saving import CheckpointFolder
from trainer.step import Stepper
from trainer.stragglers import StragglerWatch
from trainer.validate import Evaluation, build_validation
from trainer.watch import Progress, watching

logger = logging.getLogger("nsphere.train")


def never() -> bool:
    """A stop request that never comes."""
    return False


def train(
    config: Config,
    run: Path,
    ranks: Ranks,
    *,
    resume: bool = True,
    stop: Callable[[], bool] = never,
) -> bool:
    """Train, or go on with the run in folder `run`; every rank calls it together.

    True when the run is at its end. `stop` is asked after every step; when it is true on any rank,
    all save and return False. Raises ConfigError, DataError, CheckpointError
    for what the user can mend, TrainingError when training itself went wrong.
    """
    torch.backends.cuda.matmul.allow_tf32 = config.train.tf32
    torch.backends.cudnn.allow_tf32 = config.train.tf32
    torch.use_deterministic_algorithms(config.train.deterministic)
    lock = open_run_together(run, config, ranks, resume=resume)
    try:
        with failure_recorded(run, ranks), watching(run, ranks, config.launch) as progress:
            return _train(config, run, ranks, lock, progress, resume=resume, stop=stop)
    finally:
        if lock is not None:
            lock.close()


def _train(
    config: Config,
    run: Path,
    ranks: Ranks,
    lock: RunLock | None,
    progress: Progress,
    *,
    resume: bool,
    stop: Callable[[], bool],
) -> bool:
    log_to_file(run, ranks.rank)
    _tell_precision(config, ranks)
    samples = load_samples(config, ranks)
    check_fit(config, samples, ranks.world_size)
    plan = Plan.build(config, samples.epoch_samples)
    checkpoints = _open_checkpoints(config, run, ranks, plan, lock, progress)
    found = checkpoints.newest(
        resume=resume,
        check_config=partial(check_remote_config, config.checkpoint.remote, config),
    )
    model, engine, average, state = _restore(config, ranks, found, samples)
    objective = build_objective(
        config,
        model,
        engine,
        samples,
        ranks,
        checkpoint=found,
        clusters_of=clusters_of(samples.planned),
    )
    if found is not None:
        objective.load(found)
    clock = StepClock(ranks.device, told=progress.mark)
    loader = _build_loader(config, model, samples, ranks)
    writer = MetricsWriter(run, config, ranks, total_steps=plan.total_steps, start_step=state.step)
    loop = Loop(
        config=config,
        run_dir=run,
        ranks=ranks,
        plan=plan,
        model=model,
        engine=engine,
        objective=objective,
        stepper=_build_stepper(config, engine, objective, ranks, clock),
        average=average,
        checkpoints=checkpoints,
        writer=writer,
        validation=_build_validation(config, model, objective, ranks),
        epoch_samples=samples.epoch_samples,
        clock=clock,
        planning=_build_planning(config, run, samples, model, ranks, found, state, plan),
        progress=progress,
        load=partial(_load_again, ranks=ranks, engine=engine, average=average, objective=objective),
        stragglers=StragglerWatch(run, ranks, config.log.straggler_window),
    )
    record_start(run, ranks, state.step)
    try:
        last = loop.run(loader, state, stop).step
        record_end(run, ranks, last, finished=last == plan.total_steps)
        return last == plan.total_steps
    finally:
        loader.close()
        writer.close()


def _tell_precision(config: Config, ranks: Ranks) -> None:
    precision = config.train.precision
    if ranks.is_first and autocast_dtype(precision, ranks.device) != AUTOCAST[precision]:
        logger.warning(
            "train.precision = %r: this CPU has no bfloat16 arithmetic and would take 20 times as"
            " long to emulate it: computing in float32", precision,
        )  # fmt: skip


def _open_checkpoints(
    config: Config, run: Path, ranks: Ranks, plan: Plan, lock: RunLock | None, progress: Progress
) -> CheckpointFolder:
    return CheckpointFolder(
        run / "checkpoints",
        ranks,
        keep_last=config.checkpoint.keep_last,
        keep_every=plan.keep_every,
        background=config.checkpoint.background,
        max_refused=config.checkpoint.max_refused,
        remote=remote_of(config, run),
        beat=partial(progress.mark, "checkpoint"),
        lost_to=lock.lost_to if lock is not None else None,
    )


def _restore(
    config: Config, ranks: Ranks, found: Path | None, samples: SampleSet
) -> tuple[Model, Engine, WeightAverage | None, TrainState]:
    """Towers, engine and state, at the start or as checkpoint `found` has them."""
    state = TrainState(
        fingerprint=samples.fingerprint, world_size=ranks.world_size, zero_stage=config.zero.stage
    )
    if found is not None:
        state = load_state(found)
        _check_same_data(state, samples, found)
    model = build_model(config, device=ranks.device, load_weights=found is None)
    make_dropout_keyed(model)
    if config.model.global_batch_norm:
        make_batch_norm_global(model, ranks.group)
    optimizer = build_optimizer(parameter_groups(model, config.optim), config.optim, ranks.device)
    converted = state.zero_stage > 0 and state.world_size != ranks.world_size
    engine = Engine(model, optimizer, config, ranks, universal=converted)
    average = WeightAverage(engine, config.train.ema, ranks) if config.train.ema else None
    if found is not None:
        state = _load_towers(found, ranks, engine, average)
    return model, engine, average, replace(state, world_size=ranks.world_size)


def _load_towers(
    found: Path, ranks: Ranks, engine: Engine, average: WeightAverage | None
) -> TrainState:
    """What DeepSpeed holds and the averaged weights, as checkpoint `found` has them."""
    state = load_state(found)
    with portable(found, ranks, convert=engine.universal) as folder:
        engine.load(folder, state.engine)
    if average is not None:
        average.load(load_averages(found))
    logger.info("going on from %s at %d samples", found, state.samples_seen)
    return replace(state, world_size=ranks.world_size)


def _load_again(
    found: Path, ranks: Ranks, engine: Engine, average: WeightAverage | None, objective: Objective
) -> TrainState:
    """Everything as checkpoint `found` has it, in a run that is under way."""
    state = _load_towers(found, ranks, engine, average)
    objective.load(found)
    return state


def _check_same_data(state: TrainState, samples: SampleSet, found: Path) -> None:
    if state.fingerprint != samples.fingerprint:
        raise ConfigError(
            f"{found} was trained on other data (fingerprint {state.fingerprint}, these shards "
            f"have {samples.fingerprint}): give the same shards in the same order, or another --run"
        )


def _build_loader(config: Config, model: Model, samples: SampleSet, ranks: Ranks) -> TrainLoader:
    return TrainLoader(
        samples,
        config.data,
        image_transform=ImageTransform(
            model.image_size, config.data.augment, resize_mode=model.resize_mode
        ),
        tokenizer_spec=model.tokenizer_spec,
        global_batch_size=config.train.global_batch_size,
        seed=config.train.seed,
        rank=ranks.rank,
        world_size=ranks.world_size,
        device_type=ranks.device.type,
    )


def _build_planning(
    config: Config,
    run: Path,
    samples: SampleSet,
    model: Model,
    ranks: Ranks,
    found: Path | None,
    state: TrainState,
    plan: Plan,
) -> Planning | None:
    if samples.planned is None:
        return None
    planning = Planning(
        config,
        run,
        samples,
        samples.planned,
        model,
        ranks,
        total_steps=plan.total_steps,
        autocast=autocast_dtype(config.train.precision, ranks.device),
    )
    planning.load(found, state.planning, state.samples_seen)
    return planning


def _build_stepper(
    config: Config, engine: Engine, objective: Objective, ranks: Ranks, clock: StepClock
) -> Stepper:
    batch = config.train.global_batch_size
    rows = -(-batch // ranks.world_size)  # of the rank that has most
    longest = objective.most_rows(rows)
    num_chunks = -(-longest // (config.train.chunk_size or longest))
    if longest == rows:  # a chunk without samples is nothing to a batch norm
        num_chunks = min(num_chunks, batch // ranks.world_size)
    return Stepper(
        engine=engine,
        objective=objective,
        seed=config.train.seed,
        num_chunks=num_chunks,
        device=ranks.device,
        autocast_dtype=autocast_dtype(config.train.precision, ranks.device),
        clock=clock,
    )


def _build_validation(
    config: Config, model: Model, objective: Objective, ranks: Ranks
) -> Evaluation | None:
    if not config.data.val_shards:
        return None
    return build_validation(config, model, ranks, objective=objective)
