"""What `nsphere train` and `nsphere eval` do: check everything once, then start ranks or be one."""

import os
import sys
from collections import Counter
from pathlib import Path

import torch

from data.dataset import SampleSet
from data.index import Index
from launch.hosts import Hosts
from launch.jit_locks import remove_stale_locks
from launch.local import run_local
from launch.progress import shard_progress
from launch.ranks import LaunchError, is_rank, open_ranks
from launch.restarts import Restarts
from launch.signals import BAD_INPUT, RANK_LOST, STOPPED, StopRequest, dies_of_usr1, say
from trainer.config import Config, ConfigError, load_config
from trainer.run import STOPPED_MARKER, check_config, check_new
from trainer.samples import build_samples, check_fit, check_memory, count_classes
from trainer.validate import build_validation, check_sets, load_model


def is_one_of_several() -> bool:
    """True in a rank that torchrun, accelerate or srun (or `run_local`) has started."""
    return is_rank(os.environ)


def is_started_again() -> bool:
    """True in a rank that torchrun, or SLURM by a requeue, has started anew after its run began."""
    names = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")
    return any(os.environ.get(name, "0") not in ("", "0") for name in names)


def train(
    config_path: Path,
    overrides: list[str],
    run: Path,
    resume: bool,  # noqa: FBT001
    num_ranks: int,
    num_hosts: str,
    endpoint: str,
    stop: StopRequest,
) -> int:
    """Check the whole run in this process, then train on `num_ranks` ranks a host; the exit code.

    `num_hosts`: "4", or "2:4" for any number between; their launchers meet at `endpoint`.
    """
    num_ranks = num_ranks or max(1, torch.cuda.device_count())
    config = load_config(config_path, overrides)
    try:
        hosts = Hosts.parse(num_hosts, endpoint, run.name, config.launch.start_timeout)
    except ValueError as error:
        raise LaunchError(str(error)) from None
    samples = check_run(config, run, resume=resume, num_ranks=num_ranks * hosts.minimum)
    check_memory(config, num_ranks, count_classes(config, samples))
    if num_ranks == 1 and hosts.is_alone:
        return train_rank(config_path, overrides, run, resume, stop)
    if not resume:  # asked once: ranks that are started again shall go on with what this run saved
        check_new(run, config)
    arguments = ["train", str(config_path), "--run", str(run), *overrides]
    restarts = Restarts(run, config.launch.max_restarts)
    code = run_local(num_ranks, arguments, hosts=hosts, restarts=restarts, stop=stop)
    _say_end(code, run)
    return code


def check_run(config: Config, run: Path, *, resume: bool, num_ranks: int) -> SampleSet:
    """What can be known on any machine before ranks are started: the folder, the data, their fit.

    Raises ConfigError or DataError for what must be mended first.
    """
    check_config(run, config, resume=resume)
    with shard_progress("indexing shards") as progress:
        samples = build_samples(config, progress)
        if config.data.val_shards:
            check_sets(config, config.data.val_shards, progress)
    _name_problems(samples.indexes)
    check_fit(config, samples, num_ranks)
    return samples


def train_rank(
    config_path: Path,
    overrides: list[str],
    run: Path,
    resume: bool,  # noqa: FBT001
    stop: StopRequest,
) -> int:
    """Train as one rank of the group that the environment describes; the exit code."""
    from trainer.flight import is_lost_peer, shorten
    from trainer.train import train as train_together

    if os.environ.get("RANK") == "0" and dies_of_usr1(os.getppid()) and _is_under_torchrun():
        say(
            "nsphere: this torchrun dies of SIGUSR1 and its ranks with it, unsaved: start it with "
            "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1, or use nsphere train"
        )
    if os.environ.get("LOCAL_RANK", "0") == "0":
        remove_stale_locks(os.environ)
    config = load_config(config_path, overrides)
    longest = config.launch.start_timeout + config.launch.timeout
    try:
        with open_ranks(
            os.environ, meeting_s=config.launch.start_timeout, collective_s=4 * longest
        ) as ranks:
            finished = train_together(config, run, ranks, resume=resume, stop=stop)
            if finished or not ranks.is_first:
                return 0 if finished else STOPPED
    except RuntimeError as error:
        if not is_lost_peer(error):
            raise
        name = f"nsphere, rank {os.environ.get('RANK', '0')}"
        say(f"{name}: a peer was lost before training began: {shorten(error)}")
        return RANK_LOST
    (run / STOPPED_MARKER).touch()
    return STOPPED


def _is_under_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def evaluate(source: Path, overrides: list[str], num_ranks: int) -> int:
    """Check, then evaluate on `num_ranks` ranks; rank 0 prints the JSON line. The exit code."""
    checkpoint, config = _find(source, overrides)
    with shard_progress("indexing shards") as progress:
        check_sets(config, config.data.val_shards, progress)
    check_memory(config, num_ranks)
    return run_local(num_ranks, ["eval", str(checkpoint), *overrides])


def evaluate_rank(source: Path, overrides: list[str]) -> dict[str, float | str] | None:
    """Evaluate as one rank; the numbers on the first rank, None on the others."""
    from trainer.checkpoint import load_weights

    checkpoint, config = _find(source, overrides)
    with open_ranks(os.environ) as ranks:
        weights = load_weights(checkpoint, ema=True)
        model = load_model(weights, config, ranks.device)
        results = build_validation(config, model, ranks, checkpoint=checkpoint)(model)
        return {"checkpoint": str(checkpoint), **results} if ranks.is_first else None


def _find(source: Path, overrides: list[str]) -> tuple[Path, Config]:
    from trainer.checkpoint import find_checkpoint, load_checkpoint_config

    checkpoint = find_checkpoint(source)
    config = load_checkpoint_config(checkpoint, overrides)
    if not config.data.val_shards:
        raise ConfigError("no evaluation data: give --data SHARDS")
    return checkpoint, config


def _name_problems(indexes: tuple[Index, ...]) -> None:
    """A line per kind of problem: `nsphere index` lists them all."""
    problems = Counter(problem.kind for index in indexes for problem in index.problems)
    for kind, count in problems.most_common():
        example = next(p for index in indexes for p in index.problems if p.kind == kind)
        sys.stderr.write(f"{count} x {kind}, left out; e.g. {example}\n")


def _say_end(code: int, run: Path) -> None:
    if code == STOPPED:
        sys.stderr.write(f"saved and stopped; the same command goes on with {run}\n")
    elif code > BAD_INPUT or code == 1:
        sys.stderr.write(
            f"a rank failed (exit code {code}); every rank's log is in {run / 'log'}; "
            "the same command goes on from the last checkpoint\n"
        )
