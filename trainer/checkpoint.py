"""Checkpoints on disk, RUN/checkpoints/step-00001234/: what they are named, hold, and are worth.

A checkpoint is a folder whose files match its `manifest.json` (sizes and SHA-256 of all of them),
which was written last; a folder that does not match is passed over by name. How it comes to be is
`trainer/saving.py`, copies in remote stores are `trainer/remote.py`.

What is inside: `deepspeed/` (engine.py), `state.json`, `config.toml`, and where the run has them
`model.json`, `ema.safetensors`, `centers/` and `negatives/`.
"""

import hashlib
import json
import logging
import math
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import safetensors.torch
import torch.distributed as dist
from torch import Tensor

from trainer.config import Config, load_config
from trainer.ranks import Ranks

FORMAT = 1
MANIFEST = "manifest.json"

logger = logging.getLogger("nsphere.checkpoint")


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read; the text names the folder and the reason."""


@dataclass(frozen=True)
class TrainState:
    """All that resume needs beside the sharded state: plain numbers, equal on all ranks."""

    fingerprint: str  # of the training data
    world_size: int  # of the ranks that wrote it
    zero_stage: int
    step: int = 0  # steps done, skipped ones too
    samples_seen: int = 0
    bad_samples: int = 0
    skipped_steps: int = 0
    skipped_in_row: int = 0
    engine: dict[str, float] = field(default_factory=dict)
    planning: dict[str, Any] = field(default_factory=dict)
    """Planned batches: the order so far and to come (`data.planned_order.Segment`s), and what the
    controller has counted."""
    recent_losses: list[float] = field(default_factory=list)
    """What a spike is told by (`trainer/spikes.py`)."""
    passed_over: list[int] = field(default_factory=list)
    """Batches, by 0-based step, that are left out because of a spike."""


def step_name(step: int) -> str:
    """Name of a checkpoint's folder."""
    return f"step-{step:08d}"


def list_steps(folder: Path) -> list[int]:
    """Steps of the checkpoint folders, oldest first, whole or not."""
    names = (path.name.removeprefix("step-") for path in folder.glob("step-*"))
    return sorted(int(name) for name in names if name.isdigit())


def find_newest(folder: Path, before: float = math.inf) -> Path | None:
    """The newest checkpoint whose files match its manifest, of a step up to `before`.

    Logs why each newer one is skipped.
    """
    for step in reversed([step for step in list_steps(folder) if step <= before]):
        path = folder / step_name(step)
        problem = check(path)
        if not problem:
            return path
        logger.warning("skipping checkpoint %s: %s", path, problem)
    return None


def read_manifest(text: str | bytes) -> dict[str, tuple[int, str]]:
    """File name -> (size, SHA-256 in hex). Raises ValueError saying what is wrong with the text.

    A name that leads out of the checkpoint is wrong: a manifest may come from elsewhere.
    """
    tree = json.loads(text)
    if not isinstance(tree, dict) or not isinstance(tree.get("files"), dict):
        raise ValueError("it lists no files")
    if tree.get("format") != FORMAT:
        raise ValueError(f"format {tree.get('format')}, this version reads {FORMAT}")
    files = {}
    for name, entry in tree["files"].items():
        parts = PurePosixPath(name).parts
        if not parts or name.startswith("/") or ".." in parts or re.search(r"[\\\0]", name):
            raise ValueError(f"{name!r} is no place inside the checkpoint")
        size, digest = entry
        if not isinstance(size, int) or not isinstance(digest, str):
            raise ValueError(f"{name!r} has no size and checksum")
        files[name] = (size, digest)
    return files


def check(path: Path) -> str:
    """What is wrong with a checkpoint folder, or "" if every file matches the manifest."""
    if not path.is_dir():
        return "a link to nowhere" if path.is_symlink() else "no folder"
    try:
        for name, (size, digest) in read_manifest((path / MANIFEST).read_bytes()).items():
            problem = _check_file(path / name, size, digest)
            if problem:
                return problem
    except FileNotFoundError:
        return f"no {MANIFEST}: it was never finished"
    except (OSError, ValueError, TypeError) as error:
        return f"{MANIFEST} is not readable: {error}"
    return ""


def is_finished(path: Path) -> bool:
    """Whether a checkpoint is there with files of the right sizes; their bytes are not read."""
    try:
        files = read_manifest((path / MANIFEST).read_bytes())
        return all((path / name).stat().st_size == size for name, (size, _) in files.items())
    except (OSError, ValueError, TypeError):
        return False


def _check_file(path: Path, size: int, digest: str) -> str:
    if not path.is_file():
        return f"{path.name} is missing"
    have = path.stat().st_size
    if have != size:
        return f"{path.name} has {have} bytes, {size} were written"
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != digest:
            return f"{path.name} does not match its checksum: bytes have changed since the save"
    return ""


def load_state(path: Path) -> TrainState:
    """The plain numbers of a checkpoint. Raises CheckpointError for those of another version."""
    try:
        return TrainState(**json.loads((path / "state.json").read_text()))
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path / 'state.json'}: not of this version: {error}") from None


def load_averages(path: Path) -> dict[str, Tensor]:
    """The averaged weights of a checkpoint; empty if it has none."""
    averages = path / "ema.safetensors"
    return safetensors.torch.load_file(averages) if averages.is_file() else {}


@contextmanager
def portable(path: Path, ranks: Ranks, *, convert: bool) -> Iterator[Path]:
    """The folder to load a checkpoint from; `convert` makes one that any world size can load."""
    if not convert:
        yield path
        return
    from trainer.engine import to_universal

    converted = path.with_name(f".universal-{path.name}")
    if ranks.is_first:
        shutil.rmtree(converted, ignore_errors=True)
        to_universal(path, converted)
    dist.barrier(group=ranks.group)
    yield converted
    dist.barrier(group=ranks.group)
    if ranks.is_first:
        shutil.rmtree(converted, ignore_errors=True)


def load_weights(path: Path, *, ema: bool = False) -> dict[str, Tensor]:
    """Whole float32 weights of a checkpoint by TwoTower's names, in one process without a group.

    `ema`: the averaged weights where there are some. Raises CheckpointError on a damaged folder.
    """
    from trainer.engine import read_weights

    problem = check(path)
    if problem:
        raise CheckpointError(f"{path}: {problem}")
    weights = read_weights(path, load_state(path).zero_stage)
    if ema:
        weights.update(load_averages(path))
    return weights


def find_checkpoint(path: Path) -> Path:
    """A run folder or a checkpoint folder -> the checkpoint: the newest whole one of a run.

    A URL of a remote store is fetched, once. Raises CheckpointError with what there is instead.
    """
    from trainer.remote import fetch_url, url_of

    url = url_of(path)
    if url:
        return fetch_url(url)
    if (path / MANIFEST).is_file():
        return path
    newest = find_newest(path / "checkpoints")
    if newest is None:
        kind = "a run without a whole checkpoint" if path.is_dir() else "no such folder"
        raise CheckpointError(
            f"{path}: {kind}; give a run folder, or one of its checkpoints/step-* folders"
        )
    return newest


def load_checkpoint_config(path: Path, overrides: list[str] | None = None) -> Config:
    """The configuration of the run that wrote a checkpoint, with `section.key=value` overrides.

    A model file named in it is the copy inside the checkpoint, so that a checkpoint stands alone;
    shards that are shell commands (`pipe:`) are left out: it may come from elsewhere.
    """
    overrides = list(overrides or [])
    if (path / "model.json").is_file():
        overrides.append(f"--model.name={path / 'model.json'}")
    return load_config(path / "config.toml", overrides, commands="drop")
