"""How a checkpoint comes to be whole or not at all, whatever dies or refuses on the way.

Each rank writes its files into `.saving-step-00001234/` on a thread, in one pass that hashes and
flushes. When every rank is done, rank 0 writes `manifest.json` (sizes and SHA-256 of all files) and
renames the folder: the one moment at which the checkpoint begins to exist. A crash before it leaves
the last checkpoint untouched.

Ranks tell each other how far they are by short collectives of their main threads, never from the
writing thread (`trainer/together.py`): a slow disk makes nobody give up, one that refuses on any
rank is known to all at once.
"""

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from trainer.checkpoint import (
    FORMAT,
    MANIFEST,
    CheckpointError,
    TrainState,
    find_newest,
    is_finished,
    list_steps,
    step_name,
)
from trainer.durable import flush_folder, remove, write_file
from trainer.events import record_event
from trainer.host_copies import HostCopies
from trainer.ranks import Ranks
from trainer.remote import DamagedError, Remote, RemoteError, Uploader, held_already
from trainer.together import Failure, Job, Outcome, Together

VISIBLE_S = 60.0  # after which rank 0 must see what other nodes have written and flushed
logger = logging.getLogger("nsphere.checkpoint")


def _nothing() -> None:
    """No one to tell."""


def _accept(config_toml: str) -> None:
    """Any will do."""


@dataclass
class _Save:
    """One save on its way."""

    state: TrainState
    saving: Path
    final: Path
    job: Job[Any]
    committing: bool = False
    num_bytes: int = 0
    started: float = field(default_factory=time.monotonic)


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
        max_refused: int = 0,  # saves in a row that the disk may refuse before one is an error
        remote: Remote | None = None,
        beat: Callable[[], None] = _nothing,  # called while this rank waits for a save
        lost_to: Callable[[], str] | None = None,  # rank 0: why the folder is not ours any more
    ) -> None:
        self.folder = folder
        self._ranks, self._keep_last, self._keep_every = ranks, keep_last, keep_every
        self._background, self._max_refused = background, max_refused
        self._together, self._lost_to = Together(ranks, beat), lost_to
        self._copies = HostCopies(ranks.device)
        self._save: _Save | None = None
        self._num_refused = 0  # in a row
        self._untold: list[dict[str, Any]] = []  # events, rank 0
        self._unsaved = ""  # why the newest state is not on the disk
        self._remote = remote
        self._uploader: Uploader | None = None
        if remote is not None and ranks.is_first:
            self._uploader = Uploader(remote, folder.parent, keep_last, keep_every)

    def save(self, state: TrainState, config_toml: str, files: Mapping[str, Any]) -> Path:
        """Write a checkpoint of this rank's `files` (name -> torch.save object or dict of tensors).

        In the background: returns when the tensors are copied to host memory, and `poll` brings it
        to its end. Where the disk refuses on any rank, all go on with a warning; after
        `max_refused` of these in a row, and for every other failure, all raise CheckpointError.
        """
        self._drain()
        final = self.folder / step_name(state.step)
        saving = self.folder / f".saving-{final.name}"
        prepared = None
        if self._ranks.is_first:
            prepared = _prepare(saving)
            files = {**files, "state.json": asdict(state), "config.toml": config_toml}
        failures = [failure for failure in self._together.gather(prepared) if failure is not None]
        if failures:
            self._refuse(state.step, failures[0])
            return final
        copied = self._copies.take(files) if self._background else files
        self._save = _Save(state, saving, final, Job(lambda: _write(saving, copied)))
        if not self._background:
            self._drain()
        return final

    def poll(self) -> bool:
        """Bring a save in the background further, if every rank is ready; called after each step.

        False where there is none. Raises CheckpointError as `save` does.
        """
        save = self._save
        if save is None:
            return False
        if self._together.all(save.job.is_done()):
            self._advance(save)
        return True

    def wait(self) -> None:
        """Return when the last save is on the disk, and in the remote store if there is one.

        Raises CheckpointError if it is not on this disk; a remote store that refuses is a warning.
        """
        self._drain()
        if self._unsaved:
            raise CheckpointError(self._unsaved)
        if self._remote is not None:
            if self._uploader is not None:
                self._uploader.finish()
            self._together.wait_until(
                lambda: self._uploader is None or self._uploader.is_idle(),
                f"copying to {self._remote.url}",
            )

    def newest(
        self, *, resume: bool = True, check_config: Callable[[str], None] = _accept
    ) -> Path | None:
        """The newest whole checkpoint, the same on all ranks; what is passed over is logged.

        Where the remote store has a newer one than this folder it is fetched first; its config.toml
        goes to `check_config`, which raises ConfigError if it is another run's. Not `resume`: there
        may be none. Raises CheckpointError where nothing is here and the store cannot be asked.
        """
        first = self._ranks.is_first
        found = self._together.run(
            lambda: self._find(resume, check_config) if first else None,
            f"looking for a checkpoint in {self.folder}",
        )
        path: Path | None = found[0]
        return path

    def newest_before(self, step: int) -> Path | None:
        """The newest whole checkpoint of this folder up to `step`, the same on all ranks."""
        self._drain()
        first = self._ranks.is_first
        found = self._together.run(
            lambda: find_newest(self.folder, step) if first else None,
            f"looking for a checkpoint before step {step} in {self.folder}",
        )
        path: Path | None = found[0]
        return path

    def forget_after(self, step: int) -> None:
        """Remove what was saved after `step`: the run goes on from there another way."""
        self._drain()
        if self._ranks.is_first:
            for later in list_steps(self.folder):
                if later > step:
                    _hide(self.folder / step_name(later))
            if self._uploader is not None:
                self._uploader.forget_after(step)
        self._together.gather(None)

    def _find(self, resume: bool, check_config: Callable[[str], None]) -> Path | None:  # noqa: FBT001
        _clear_unfinished(self.folder)
        found = find_newest(self.folder)
        if self._remote is None:
            return found
        here = int(found.name.removeprefix("step-")) if found is not None else -1
        try:
            fetched = _fetch_newer(self._remote, self.folder, here, resume, check_config)
        except RemoteError as error:
            if found is None:
                raise CheckpointError(
                    f"{self.folder} holds no checkpoint, and whether the remote store does cannot "
                    f"be asked ({error}): start again when it answers, or with "
                    "--checkpoint.remote= to begin anew"
                ) from None
            logger.warning("the remote store cannot be asked for a newer checkpoint: %s", error)
            return found
        return fetched or found

    def _drain(self) -> None:
        """Bring the save on its way to its end, whichever that is."""
        while (save := self._save) is not None:
            self._together.wait_until(save.job.is_done, f"saving {save.final}")
            self._advance(save)

    def _advance(self, save: _Save) -> None:
        """Every rank's job is done: on to the commit, or to the end."""
        outcomes: list[Outcome[Any]] = self._together.gather(save.job.outcome())
        failures = [
            replace(outcome.failure, reason=f"rank {rank}: {outcome.failure.reason}")
            for rank, outcome in enumerate(outcomes)
            if outcome.failure is not None
        ]
        if failures:
            self._save = None
            self._refuse(save.state.step, failures[0])
        elif not save.committing:
            files: dict[str, tuple[int, str]] = {}
            for outcome in outcomes:
                files.update(outcome.value or {})
            first = self._ranks.is_first
            save.job = Job(lambda: self._commit(save, files) if first else None)
            save.committing = True
            save.num_bytes = sum(size for size, _ in files.values())
        else:
            self._save, self._num_refused, self._unsaved = None, 0, ""
            seconds = time.monotonic() - save.started
            logger.info("%s saved: %d bytes in %.3f s", save.final.name, save.num_bytes, seconds)
            if self._untold:
                self._tell()
            if self._uploader is not None:
                self._uploader.submit(save.final)

    def _refuse(self, step: int, failure: Failure) -> None:
        """On all ranks: a save has failed. Go on if it may, else raise CheckpointError."""
        self._num_refused += failure.refused
        self._unsaved = f"{self.folder / step_name(step)}: not saved: {failure.reason}"
        last = ""
        if self._ranks.is_first:
            for torso in self.folder.glob(".saving-*"):  # it would keep a full disk full
                remove(torso)
            self._tell({"step": step, "error": failure.reason})
            last = next((step_name(s) for s in reversed(list_steps(self.folder))), "none")
        last = self._together.gather(last)[0]
        self._unsaved += f"; the newest checkpoint there: {last}"
        if not failure.refused or self._num_refused > self._max_refused:
            raise CheckpointError(self._unsaved)
        logger.warning(
            "%s; training goes on and the next save tries again (refused %d in a row, "
            "checkpoint.max_refused = %d)",
            *(self._unsaved, self._num_refused, self._max_refused),
        )

    def _tell(self, *refused: dict[str, Any]) -> None:
        """Record events of refused saves; those that the disk does not take either come later."""
        run = self.folder.parent
        told = [*self._untold, *refused]
        self._untold = [d for d in told if not record_event(run, "save_refused", d)]

    def _commit(self, save: _Save, files: dict[str, tuple[int, str]]) -> None:
        """Manifest, rename, prune. Runs on rank 0, in a thread."""
        saving, final = save.saving, save.final
        _await_sight(saving, files)
        write_file(saving / MANIFEST, {"format": FORMAT, "files": dict(sorted(files.items()))})
        for folder in {saving, *(path for path in saving.rglob("*") if path.is_dir())}:
            flush_folder(folder)
        if self._lost_to is not None and (problem := self._lost_to()):
            raise CheckpointError(problem)
        replaced = final.with_name(f".replaced-{final.name}")
        if final.is_symlink() or final.exists():  # saved again: after a resume from before it
            remove(replaced)
            final.rename(replaced)  # comes back if this is where the run is killed
        saving.rename(final)
        flush_folder(final.parent)
        remove(replaced)
        self._prune(save.state.step)

    def _prune(self, newest: int) -> None:
        """Keep the last whole ones up to `newest`, which is whole; later ones are not ours."""
        steps = [step for step in list_steps(self.folder) if step <= newest]
        whole = [step for step in steps if is_finished(self.folder / step_name(step))]
        kept = {step_name(step) for step in whole[-self._keep_last :]}
        kept |= {step_name(s) for s in steps if self._keep_every and s % self._keep_every == 0}
        if self._uploader is not None:
            kept |= self._uploader.busy()
        for step in steps:
            if step_name(step) not in kept:
                _hide(self.folder / step_name(step))


def _prepare(saving: Path) -> Failure | None:
    """An empty folder to write into."""
    try:
        remove(saving)
        saving.mkdir(parents=True)
    except OSError as error:
        return Failure.of(error)
    return None


def _write(saving: Path, files: Mapping[str, Any]) -> dict[str, tuple[int, str]]:
    """This rank's files; their sizes and checksums."""
    return {name: write_file(saving / name, item) for name, item in files.items()}


def _await_sight(saving: Path, files: Mapping[str, tuple[int, str]]) -> None:
    """What every rank wrote is here; network file systems may take a moment."""
    until = time.monotonic() + VISIBLE_S
    for name, (size, _) in files.items():
        while not (saving / name).is_file() or (saving / name).stat().st_size != size:
            if time.monotonic() > until:
                raise CheckpointError(
                    f"rank 0 does not see {saving / name}, which another rank has written: the run "
                    "folder must be on a file system that all nodes share"
                )
            time.sleep(0.1)


def _fetch_newer(
    remote: Remote,
    folder: Path,
    here: int,
    resume: bool,  # noqa: FBT001
    check_config: Callable[[str], None],
) -> Path | None:
    """The newest whole remote checkpoint, if it is of a later step than `here`; fetched."""
    steps = remote.steps()
    if steps and not resume:
        raise held_already(remote.url)
    for step in reversed(steps):
        config = remote.config(step)
        if config:
            check_config(config)
        if step <= here:
            return None
        try:
            path = remote.fetch(step, folder)
        except DamagedError as error:
            logger.warning("skipping remote checkpoint %s", error)
            continue
        logger.warning("%s: fetched from %s", path, remote.url)
        return path
    return None


def _hide(path: Path) -> None:
    """Remove a checkpoint; half a removal must not look like a broken one."""
    hidden = path.with_name(f".removing-{path.name}")
    remove(hidden)
    path.rename(hidden)
    remove(hidden)


def _clear_unfinished(folder: Path) -> None:
    for replaced in sorted(folder.glob(".replaced-*")):
        final = folder / replaced.name.removeprefix(".replaced-")
        if not final.exists():  # killed between two renames
            replaced.rename(final)
        remove(replaced)
    for torso in sorted(folder.glob(".saving-*")):
        logger.warning("removing %s: the run was stopped inside this save", torso)
        remove(torso)
    for kind in ("removing", "universal", "fetching"):
        for leftover in folder.glob(f".{kind}-*"):
            remove(leftover)
