"""Checkpoints that are whole or do not exist: RUN/checkpoints/step-00001234/.

The protocol (DESIGN section 3). Each rank writes its files into `.saving-step-00001234/` through
one pass that hashes and flushes, then a record of them. When every rank's record is there, rank 0
writes `manifest.json` (sizes and SHA-256 of all files) and renames the folder: the one moment at
which the checkpoint begins to exist. A crash before it leaves the last checkpoint untouched; a
folder whose files do not match its manifest is passed over by name.

What is inside: `deepspeed/` (engine.py), `state.json`, `config.toml`, and where the run has them
`model.json` and `ema.safetensors`.
"""

import hashlib
import json
import logging
import shutil
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch.distributed as dist
from torch import Tensor

from trainer.config import Config, load_config
from trainer.durable import flush_folder, write_file
from trainer.ranks import Ranks

FORMAT = 1
MANIFEST = "manifest.json"
RECORD_TIMEOUT_S = 1800.0  # rank 0 gives up on another rank's record: a slow disk, not a dead rank

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


class CheckpointFolder:
    """The checkpoints of one run; every rank holds one and calls it together with the others."""

    def __init__(
        self,
        folder: Path,
        ranks: Ranks,
        *,
        keep_last: int,
        keep_every: int = 0,  # steps; 0: none are kept for ever
        background: bool = False,
    ) -> None:
        self.folder = folder
        self._ranks, self._keep_last, self._keep_every = ranks, keep_last, keep_every
        self._background = background
        self._writer: threading.Thread | None = None
        self._error: str = ""

    def save(self, state: TrainState, config_toml: str, files: Mapping[str, Any]) -> Path:
        """Write a checkpoint of this rank's `files` (name -> torch.save object or dict of tensors).

        In the background: returns when the tensors are copied to host memory; a failure is raised
        by the next `save` or `wait`. Raises CheckpointError on every rank if any rank failed.
        """
        self.wait()
        final = self.folder / step_name(state.step)
        saving = self.folder / f".saving-{final.name}"
        if self._ranks.is_first:
            shutil.rmtree(saving, ignore_errors=True)
            saving.mkdir(parents=True)
            files = {**files, "state.json": asdict(state), "config.toml": config_toml}
        _barrier(self._ranks)
        if self._background:
            copied = _on_host(files)
            self._writer = threading.Thread(target=self._write, args=(saving, final, copied))
            self._writer.start()
        else:
            self._write(saving, final, files)
            self._raise_together()
        return final

    def wait(self) -> None:
        """Return when the save in the background is done; raises CheckpointError if it failed."""
        if self._writer is not None:
            self._writer.join()
            self._writer = None
            self._raise_together()

    def _write(self, saving: Path, final: Path, files: Mapping[str, Any]) -> None:
        try:
            records = {name: write_file(saving / name, item) for name, item in files.items()}
            _write_record(saving, self._ranks.rank, {"files": records})
            if self._ranks.is_first:
                _commit(saving, final, self._ranks.world_size)
                self._prune()
        except (OSError, RuntimeError) as error:
            self._error = f"{final}: not saved: {error}"
            _record_failure(saving, self._ranks.rank, str(error))

    def _raise_together(self) -> None:
        errors = _gather(self._error, self._ranks)
        self._error = ""
        failed = next((error for error in errors if error), "")
        if not failed:
            return
        if self._ranks.is_first:  # a torso would keep a full disk full
            for torso in self.folder.glob(".saving-*"):
                shutil.rmtree(torso, ignore_errors=True)
        raise CheckpointError(failed)

    def _prune(self) -> None:
        steps = list_steps(self.folder)
        for step in steps[: -self._keep_last]:
            if not (self._keep_every and step % self._keep_every == 0):
                doomed = self.folder / step_name(step)
                hidden = self.folder / f".removing-{doomed.name}"
                doomed.rename(hidden)  # half a removal must not look like a broken checkpoint
                shutil.rmtree(hidden, ignore_errors=True)

    def newest(self) -> Path | None:
        """The newest whole checkpoint, the same on all ranks; what is passed over is logged."""
        found: Path | None = None
        if self._ranks.is_first:
            _clear_unfinished(self.folder)
            found = find_newest(self.folder)
        return _broadcast(found, self._ranks)


def step_name(step: int) -> str:
    """Name of a checkpoint's folder."""
    return f"step-{step:08d}"


def list_steps(folder: Path) -> list[int]:
    """Steps of the checkpoint folders, oldest first, whole or not."""
    names = (path.name.removeprefix("step-") for path in folder.glob("step-*"))
    return sorted(int(name) for name in names if name.isdigit())


def find_newest(folder: Path) -> Path | None:
    """The newest checkpoint whose files match its manifest; logs why each newer one is skipped."""
    for step in reversed(list_steps(folder)):
        path = folder / step_name(step)
        problem = check(path)
        if not problem:
            return path
        logger.warning("skipping checkpoint %s: %s", path, problem)
    return None


def check(path: Path) -> str:
    """What is wrong with a checkpoint folder, or "" if every file matches the manifest."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        if manifest["format"] != FORMAT:
            return f"format {manifest['format']}, this version reads {FORMAT}"
        for name, (size, digest) in manifest["files"].items():
            problem = _check_file(path / name, size, digest)
            if problem:
                return problem
    except FileNotFoundError:
        return f"no {MANIFEST}: it was never finished"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{MANIFEST} is not readable: {error!r}"
    return ""


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
    """The plain numbers of a checkpoint."""
    return TrainState(**json.loads((path / "state.json").read_text()))


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
    _barrier(ranks)
    yield converted
    _barrier(ranks)
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

    Raises CheckpointError with what there is instead.
    """
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

    A model file named in it is the copy inside the checkpoint, so that a checkpoint stands alone.
    """
    overrides = list(overrides or [])
    if (path / "model.json").is_file():
        overrides.append(f"--model.name={path / 'model.json'}")
    return load_config(path / "config.toml", overrides)


def _write_record(saving: Path, rank: int, record: Mapping[str, Any]) -> None:
    """Publish what this rank wrote, whole or not at all."""
    path = saving / f".rank-{rank:05d}.json"
    beside = path.with_suffix(".part")
    beside.write_text(json.dumps(record))
    beside.rename(path)


def _record_failure(saving: Path, rank: int, error: str) -> None:
    """Tell rank 0 at once, if the disk still takes a few bytes; else it waits for the timeout."""
    try:
        for big in saving.glob(f"deepspeed/*rank_{rank}_*"):
            big.unlink()
        _write_record(saving, rank, {"error": error})
    except OSError:
        logger.exception("rank %d: its failure could not be recorded in %s", rank, saving)


def _commit(saving: Path, final: Path, world_size: int) -> None:
    """Wait for every rank's record, write the manifest, rename. Runs on rank 0."""
    files: dict[str, tuple[int, str]] = {}
    for rank in range(world_size):
        path = saving / f".rank-{rank:05d}.json"
        record = _wait_for_record(path)
        if "error" in record:
            raise CheckpointError(f"rank {rank}: {record['error']}")
        files.update(record["files"])
        path.unlink()
    write_file(saving / MANIFEST, {"format": FORMAT, "files": dict(sorted(files.items()))})
    for folder in {saving, *(path for path in saving.rglob("*") if path.is_dir())}:
        flush_folder(folder)
    if final.exists():  # the same step saved again: after a resume, or a stop right after a save
        shutil.rmtree(final)
    saving.rename(final)
    flush_folder(final.parent)


def _wait_for_record(path: Path) -> dict[str, Any]:
    deadline = time.monotonic() + RECORD_TIMEOUT_S
    while not path.exists():
        if time.monotonic() > deadline:
            raise CheckpointError(f"{path.name} did not come within {RECORD_TIMEOUT_S:.0f} s")
        time.sleep(0.005)
    record: dict[str, Any] = json.loads(path.read_text())
    return record


def _clear_unfinished(folder: Path) -> None:
    for torso in sorted(folder.glob(".saving-*")):
        logger.warning("removing %s: the run was stopped inside this save", torso)
        shutil.rmtree(torso, ignore_errors=True)
    for leftover in [*folder.glob(".removing-*"), *folder.glob(".universal-*")]:
        shutil.rmtree(leftover, ignore_errors=True)


def _on_host(item: Any) -> Any:
    """A deep copy of the tensors in CPU memory, so that training may change the live ones."""
    if isinstance(item, Tensor):
        return item.detach().to("cpu", copy=True)
    if type(item) in (dict, OrderedDict):
        return type(item)((key, _on_host(value)) for key, value in item.items())
    if type(item) in (list, tuple):
        return type(item)(_on_host(value) for value in item)
    return item


def _barrier(ranks: Ranks) -> None:
    _gather(None, ranks)


def _gather(item: Any, ranks: Ranks) -> list[Any]:
    if ranks.world_size == 1:
        return [item]
    items: list[Any] = [None] * ranks.world_size
    dist.all_gather_object(items, item, group=ranks.group)
    return items


def _broadcast(item: Any, ranks: Ranks) -> Any:
    return _gather(item, ranks)[0]
