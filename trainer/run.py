"""The run folder: whose it is, what configuration it belongs to, and the small files in it.

RUN/config.toml, RUN/samples/step-*.json, RUN/log/rank-*.log, RUN/.lock. Metrics are
`trainer/metrics.py`'s, checkpoints `trainer/checkpoint.py`'s.
"""

import fcntl
import json
import logging
import os
import socket
from pathlib import Path
from typing import IO

from trainer.config import Config, ConfigError, differing_keys, dump_config, load_config

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
    "eval.",
)
STOPPED_MARKER = ".stopped"


def check_config(run: Path, config: Config, *, resume: bool) -> None:
    """Raise ConfigError if `run` holds another run's work, saying which keys differ."""
    path = run / "config.toml"
    started = path.exists() or (run / "checkpoints").exists()
    if started and not resume:
        raise ConfigError(
            f"{run} holds a run already and --resume=never was given: "
            "name another folder with --run, or leave --resume out to go on with it"
        )
    if not path.exists():
        return
    keys = [
        line
        for line in differing_keys(load_config(path), config)
        if not any(
            line.split(":")[0] == k or (k[-1] == "." and line.startswith(k)) for k in FREE_KEYS
        )
    ]
    if keys:
        raise ConfigError(
            f"{run} belongs to a run of another configuration ({'; '.join(keys)}): "
            "name another folder with --run, or go on with the old values"
        )


def open_run(run: Path, config: Config) -> IO[str]:
    """Make the folder, take its lock, write config.toml; the lock lasts while the file is open.

    Raises ConfigError naming the owner when another process holds the run.
    """
    run.mkdir(parents=True, exist_ok=True)
    lock = (run / ".lock").open("a+")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.seek(0)
        owner = lock.read().strip() or "another process"
        lock.close()
        raise ConfigError(
            f"{run} is in use by {owner}: wait for it, or name another --run"
        ) from None
    lock.truncate(0)
    lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    lock.flush()
    (run / STOPPED_MARKER).unlink(missing_ok=True)
    beside = run / ".config.toml"
    beside.write_text(dump_config(config))
    beside.replace(run / "config.toml")
    return lock


def log_to_file(run: Path, rank: int) -> None:
    """Send this rank's log to RUN/log/rank-0000.log; warnings also go to stderr on rank 0."""
    (run / "log").mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(run / "log" / f"rank-{rank:04d}.log")
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
    """RUN/samples/step-00000012.json: the keys of a global batch in order."""
    folder = run / "samples"
    folder.mkdir(exist_ok=True)
    path = folder / f"step-{step:08d}.json"
    beside = path.with_suffix(".part")
    beside.write_text(json.dumps({"step": step, "keys": keys}))
    beside.replace(path)
