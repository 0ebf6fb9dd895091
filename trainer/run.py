"""The run folder: whose it is, what configuration it belongs to, and the small files in it.

RUN/config.toml, RUN/samples/step-*.json, RUN/log/rank-*.log, RUN/.lock. Metrics are
`trainer/metrics.py`'s, checkpoints `trainer/checkpoint.py`'s.
"""

import json
import logging
import os
import sys
import time
import tomllib
from pathlib import Path

import torch.distributed as dist

from trainer.config import (
    Config,
    ConfigError,
    differing_keys,
    dump_config,
    load_config,
    parse_config,
)
from trainer.durable import remove
from trainer.lock import LOCK_FILE, RunLock, read_owner
from trainer.ranks import Ranks
from trainer.remote import Remote, RemoteError, held_already

# What may differ when a run goes on: none of these changes what is learnt from which samples. Where
# shards lie may change too: the fingerprint in each checkpoint says whether they are the same data.
FREE_KEYS = (
    "data.shards",
    "data.val_shards",
    "data.workers",
    "data.prefetch",
    "data.read_ahead",
    "data.cache_dir",
    "data.cache_bytes",
    "data.max_bad_fraction",
    "labels.filter",
    "labels.propensity",
    "labels.top",
    "train.max_skipped",
    "checkpoint.",
    "launch.",
    "log.",
    "spikes.",
    "eval.",
)
logger = logging.getLogger("nsphere.run")

STOPPED_MARKER = ".stopped"
VISIBLE_S = 30.0  # after which what rank 0 wrote must be seen by every node


def check_config(run: Path, config: Config, *, resume: bool) -> None:
    """Raise ConfigError if `run` holds another run's work, saying which keys differ."""
    remote_of(config, run)
    path = run / "config.toml"
    started = path.exists() or (run / "checkpoints").exists()
    if started and not resume:
        raise ConfigError(
            f"{run} holds a run already and --resume=never was given: "
            "name another folder with --run, or leave --resume out to go on with it"
        )
    if not path.exists():
        return
    keys = _differences(load_config(path, commands="keep"), config)
    if keys:
        raise ConfigError(
            f"{run} belongs to a run of another configuration ({'; '.join(keys)}): "
            "name another folder with --run, or go on with the old values"
        )


def remote_of(config: Config, run: Path) -> Remote | None:
    """The remote store of the run's checkpoints, if it has one; not asked for anything yet.

    Raises ConfigError for a URL, a driver or a place that cannot be.
    """
    url = config.checkpoint.remote
    if not url:
        return None
    remote, here = Remote(url), (run / "checkpoints").resolve()
    there = remote.local_path()
    if there is not None and (here == there.resolve() or here in there.resolve().parents):
        raise ConfigError(
            f"checkpoint.remote = {url!r} is the run's own checkpoints folder: name another place"
        )
    return remote


def check_new(run: Path, config: Config) -> None:
    """Raise ConfigError if the run's remote store has a checkpoint, or cannot say."""
    remote = remote_of(config, run)
    try:
        steps = remote.steps() if remote is not None else []
    except RemoteError as error:
        raise ConfigError(
            f"whether checkpoint.remote = {config.checkpoint.remote!r} holds a run already cannot "
            f"be asked ({error}): start again when it answers, or leave --resume=never out"
        ) from None
    if steps:
        raise held_already(config.checkpoint.remote)


def check_remote_config(url: str, config: Config, stored: str) -> None:
    """Raise ConfigError if `stored`, config.toml of a remote checkpoint, is another run's."""
    try:
        keys = _differences(parse_config(tomllib.loads(stored), url), config)
    except ValueError as error:
        keys = [f"its config.toml is not of this version: {error}"]
    if keys:
        raise ConfigError(
            f"checkpoint.remote = {url!r} belongs to a run of another configuration "
            f"({'; '.join(keys)}): name another place, or go on with the old values"
        )


def _differences(other: Config, config: Config) -> list[str]:
    """Keys that may not differ when a run goes on."""
    return [
        line
        for line in differing_keys(other, config)
        if not any(
            line.split(":")[0] == k or (k[-1] == "." and line.startswith(k)) for k in FREE_KEYS
        )
    ]


def open_run(run: Path, config: Config) -> RunLock:
    """Make the folder, take its lock, write config.toml; the lock lasts until it is closed.

    Raises ConfigError naming the owner when another process holds the run, and saying what the
    system refuses where the folder cannot be written.
    """
    lock = None
    try:
        run.mkdir(parents=True, exist_ok=True)
        lock = RunLock(run / LOCK_FILE)
        _write_first(run, config)
    except OSError as error:
        if lock is not None:
            lock.close()
        raise ConfigError(
            f"{run}: this run cannot write there ({error.filename or run}: {error.strerror}, as "
            f"user {os.geteuid()}): mend that, or name another folder with --run"
        ) from None
    return lock


def _write_first(run: Path, config: Config) -> None:
    """config.toml, and a try at each folder that the run will write."""
    (run / STOPPED_MARKER).unlink(missing_ok=True)
    beside = run / ".config.toml"
    beside.write_text(dump_config(config))
    beside.replace(run / "config.toml")
    for name in ("checkpoints", "log"):
        (run / name).mkdir(exist_ok=True)
        probe = run / name / ".writable"
        probe.write_bytes(b"")
        probe.unlink()


def open_run_together(
    run: Path, config: Config, ranks: Ranks, *, resume: bool = True
) -> RunLock | None:
    """`check_config` and `open_run` on the first rank, told to all: each raises what it raised.

    The others do not look themselves: they would take what the first one writes for another run.
    Raises ConfigError too on a rank that does not see what the first one wrote: the folder must lie
    on a file system that all nodes share.
    """
    lock, told = None, ""
    if ranks.is_first:
        try:
            check_config(run, config, resume=resume)
            lock = open_run(run, config)
        except ConfigError as error:
            told = str(error)
    words: list[str] = [told, lock.token if lock is not None else ""]
    dist.broadcast_object_list(words, group=ranks.group, group_src=0)
    if words[0]:
        raise ConfigError(words[0])
    blind: list[bool] = [False] * ranks.world_size
    dist.all_gather_object(blind, not _sees(run, words[1]), group=ranks.group)
    if any(blind):
        if lock is not None:
            lock.close()
        raise ConfigError(
            f"rank {blind.index(True)} does not see what rank 0 writes to {run}: the run folder "
            "must be on a file system that all nodes share; name one with --run"
        )
    return lock


def _sees(run: Path, token: str) -> bool:
    until = time.monotonic() + VISIBLE_S
    while (owner := read_owner(run / LOCK_FILE)) is None or owner.token != token:
        if time.monotonic() > until:
            return False
        time.sleep(0.2)
    return True


class _LogFile(logging.FileHandler):
    """Says once on stderr that a full disk takes no lines; they are written when it does again."""

    _refused = False

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's name
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self._refused:
            self._refused = True
            sys.stderr.write(f"{self.baseFilename}: {error.strerror}: the log waits for room\n")


def log_to_file(run: Path, rank: int) -> None:
    """Send this rank's log to RUN/log/rank-0000.log; warnings also go to stderr on rank 0."""
    (run / "log").mkdir(parents=True, exist_ok=True)
    handler = _LogFile(run / "log" / f"rank-{rank:04d}.log")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger("nsphere")
    root.setLevel(logging.INFO)
    root.handlers = [handler]
    root.propagate = False
    if rank == 0:
        console = logging.StreamHandler()
        console.setLevel(logging.WARNING)
        console.setFormatter(logging.Formatter("%(message)s"))
        root.addHandler(console)


def write_samples(run: Path, step: int, keys: list[str]) -> None:
    """RUN/samples/step-00000012.json: the keys of a global batch in order.

    A disk that refuses is a warning: what is learnt does not depend on it.
    """
    folder = run / "samples"
    path = folder / f"step-{step:08d}.json"
    beside = path.with_suffix(".part")
    try:
        folder.mkdir(exist_ok=True)
        beside.write_text(json.dumps({"step": step, "keys": keys}))
        beside.replace(path)
    except OSError as error:
        logger.warning("%s: not written: %s", path, error.strerror)
        remove(beside)
