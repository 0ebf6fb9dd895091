"""Checkpoints in a remote store, any that fsspec knows: URL/step-00001234/ beside the local ones.

Parts go first and `manifest.json` last, so what was cut off is never taken for whole; on the way
back every file is checked against it. The store is a copy: one that is down never stops training.
"""

import fcntl
import hashlib
import logging
import os
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import fsspec
from fsspec.utils import get_protocol

from data.errors import DataError
from data.retry import Retry, TransientError
from trainer.checkpoint import MANIFEST, CheckpointError, check, read_manifest, step_name
from trainer.config import ConfigError
from trainer.durable import flush_folder, remove
from trainer.events import record_event

T = TypeVar("T")
Files = dict[str, tuple[int, str]]
PATIENCE_S = 600.0  # without a file arriving, at the end of a run, before the upload is given up

logger = logging.getLogger("nsphere.remote")


class RemoteError(RuntimeError):
    """The store does not do what it was asked; the text names the place and the reason."""


class DamagedError(RemoteError):
    """What the store gave back is not what was written."""


def held_already(url: str) -> ConfigError:
    """--resume=never was given, and the store has a run."""
    return ConfigError(
        f"checkpoint.remote = {url!r} holds a run already and --resume=never was given: "
        "name another place, or leave --resume out to go on with it"
    )


class Remote:
    """A folder of a store. Not for several threads at once."""

    def __init__(self, url: str, retry: Retry | None = None) -> None:
        """Raises ConfigError for a URL that is none, and for a driver that is not installed."""
        self.url = url.rstrip("/")
        self._retry = retry or Retry(attempts=4)
        self._opened: tuple[Any, str] | None = None
        self._sent: tuple[str, set[str]] = ("", set())  # files of an upload that was broken off
        try:  # nothing is asked of the store yet: it may be down for now
            self._driver = fsspec.get_filesystem_class(get_protocol(url))
            path = str(self._driver._strip_protocol(url))
        except (ImportError, ValueError, TypeError) as error:
            raise ConfigError(f"checkpoint.remote = {url!r}: {error}") from None
        if not path.strip("/") or re.match(r"[A-Za-z][\w+.-]+:/?[^/]", url):
            raise ConfigError(
                f"checkpoint.remote = {url!r} names no folder of a store, like s3://bucket/run"
            )

    def local_path(self) -> Path | None:
        """Where it lies, if it is a folder of this machine."""
        local = "file" in self._driver.protocol
        return Path(str(self._driver._strip_protocol(self.url))) if local else None

    def steps(self) -> list[int]:
        """Steps of its checkpoints, oldest first, whole or not."""
        names = self._ask("", lambda system, path: _names(system, path))
        steps = (re.fullmatch(r"step-(\d{1,18})", name) for name in names or [])
        return sorted(int(found[1]) for found in steps if found)

    def manifest(self, step: int) -> tuple[bytes, Files] | None:
        """Of a whole checkpoint, as text and read; None for what is not whole."""
        text = self._read(step, MANIFEST)
        if text is None:
            return None
        try:
            return text, read_manifest(text)
        except (ValueError, TypeError) as error:
            logger.warning("%s/%s: its manifest is wrong: %s", self.url, step_name(step), error)
            return None

    def config(self, step: int) -> str:
        """config.toml of a checkpoint, or "" where it has none."""
        return (self._read(step, "config.toml") or b"").decode(errors="replace")

    def upload(self, checkpoint: Path, progress: Callable[[], None] = lambda: None) -> None:
        """Copy a whole checkpoint; one of the same step that is there already is replaced.

        `progress` is called after each file. Raises RemoteError when the store goes on refusing.
        """
        text = (checkpoint / MANIFEST).read_bytes()
        step = int(checkpoint.name.removeprefix("step-"))
        there = self._read(step, MANIFEST)
        if there == text:
            return
        if there is not None:  # from now on it is not whole
            self._ask(f"{checkpoint.name}/{MANIFEST}", _remove_file)
        digest = hashlib.sha256(text).hexdigest()
        if self._sent[0] != digest:
            self._sent = (digest, set())
        for name, (size, _) in read_manifest(text).items():
            if name not in self._sent[1]:
                self._put(checkpoint / name, f"{checkpoint.name}/{name}", size)
                self._sent[1].add(name)
                progress()
        self._put(checkpoint / MANIFEST, f"{checkpoint.name}/{MANIFEST}", len(text))

    def fetch(self, step: int, folder: Path) -> Path:
        """Bring a checkpoint to `folder`/step-...; it is there when every file is right.

        Raises DamagedError for one that is not whole, RemoteError when the store refuses.
        """
        name = step_name(step)
        found = self.manifest(step)
        if found is None:
            raise DamagedError(f"{self.url}/{name}: no {MANIFEST}: it was never finished")
        text, files = found
        fetching = folder / f".fetching-{name}"
        remove(fetching)
        fetching.mkdir(parents=True)
        for part in files:
            target = fetching / part
            target.parent.mkdir(parents=True, exist_ok=True)
            self._get(f"{name}/{part}", target)
        (fetching / MANIFEST).write_bytes(text)
        problem = check(fetching)
        if problem:
            remove(fetching)
            raise DamagedError(f"{self.url}/{name}: {problem}")
        for path in [*fetching.rglob("*"), fetching]:
            flush_folder(path)
        remove(folder / name)  # a damaged one: a whole one would not have been fetched over
        fetching.rename(folder / name)
        flush_folder(folder)
        return folder / name

    def prune(self, keep_last: int, keep_every: int, newest: int) -> None:
        """Leave the last whole ones up to step `newest`, and the multiples of `keep_every`.

        Later ones go too: the run has gone on from before them.
        """
        steps = self.steps()
        whole = [step for step in steps if step <= newest and self.manifest(step) is not None]
        kept = {*whole[-keep_last:], *(s for s in whole if keep_every and s % keep_every == 0)}
        if kept:
            self._remove([step for step in steps if step not in kept])

    def remove_after(self, step: int) -> None:
        """Remove the checkpoints of later steps."""
        self._remove([later for later in self.steps() if later > step])

    def _remove(self, steps: list[int]) -> None:
        for step in steps:
            self._ask(f"{step_name(step)}/{MANIFEST}", _remove_file)
            self._ask(step_name(step), lambda system, path: system.rm(path, recursive=True))

    def _read(self, step: int, name: str) -> bytes | None:
        """A small file; None where it is not."""

        def read(system: Any, path: str) -> bytes:
            system.info(path)  # the one call that every driver answers with FileNotFoundError
            try:
                return bytes(system.cat_file(path))
            except FileNotFoundError as error:  # fsspec's ftp says so of a server that is busy
                raise OSError(f"{path} is listed and not given") from error

        return self._ask(f"{step_name(step)}/{name}", read)

    def _put(self, local: Path, name: str, size: int) -> None:
        def put(system: Any, path: str) -> None:
            system.makedirs(path.rpartition("/")[0], exist_ok=True)
            system.put_file(str(local), path)
            system.invalidate_cache()
            arrived = system.info(path)["size"]
            if arrived is not None and arrived != size:
                raise OSError(f"{arrived} of {size} bytes arrived")

        if not local.is_file():
            raise RemoteError(f"{local} is gone: it could not be copied to {self.url}")
        self._ask(name, put, absent_is_error=True)

    def _get(self, name: str, target: Path) -> None:
        def get(system: Any, path: str) -> bool:
            system.get_file(path, str(target))
            return True

        if self._ask(name, get) is None:
            raise DamagedError(f"{self.url}/{name} is missing")

    def _ask(
        self, name: str, call: Callable[[Any, str], T], *, absent_is_error: bool = False
    ) -> T | None:
        """`call(file system, path)`, tried again while it fails; None where there is no such file.

        Raises RemoteError with the last reason.
        """
        place = f"{self.url}/{name}".rstrip("/")

        def attempt() -> T | None:
            try:
                if self._opened is None:
                    self._opened = fsspec.core.url_to_fs(self.url, skip_instance_cache=True)
                system, root = self._opened
                system.invalidate_cache()
                return call(system, f"{root.rstrip('/')}/{name}".rstrip("/"))
            except (FileNotFoundError, NotADirectoryError) as error:
                if not absent_is_error:
                    return None
                raise TransientError(_reason(error)) from None
            except Exception as error:  # noqa: BLE001 - each store has errors of its own
                self._opened = None  # a connection that broke stays broken
                raise TransientError(_reason(error)) from None

        try:
            return self._retry.run(place, attempt)
        except DataError as error:
            raise RemoteError(str(error)) from None


def _names(system: Any, path: str) -> list[str]:
    entries = system.ls(path, detail=False)
    return [str(entry).rstrip("/").rpartition("/")[2] for entry in entries]


def _remove_file(system: Any, path: str) -> None:
    system.info(path)
    system.rm_file(path)


def _reason(error: BaseException) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__


class Uploader:
    """Copies checkpoints to a remote store on a thread, one at a time; the newest one wins."""

    def __init__(
        self, remote: Remote, run: Path, keep_last: int, keep_every: int, *, pause_s: float = 30.0
    ) -> None:
        self._remote, self._run = remote, run
        self._keep_last, self._keep_every = keep_last, keep_every
        self._pause_s = pause_s  # after an upload that failed, doubled each time to ten minutes
        self._changed = threading.Condition()
        self._waiting: Path | None = None
        self._current: Path | None = None
        self._forget: int | None = None
        self._working = False
        self._finishing = False
        self._moved = time.monotonic()  # when a file last arrived
        self._thread: threading.Thread | None = None

    def submit(self, checkpoint: Path) -> None:
        """Copy it when the one under way is done; one that still waits is let go."""
        with self._changed:
            self._waiting, self._finishing = checkpoint, False
            self._wake()

    def forget_after(self, step: int) -> None:
        """Remove what the store has of later steps."""
        with self._changed:
            self._forget = step
            self._wake()

    def busy(self) -> set[str]:
        """Names of checkpoints that must stay on this disk for now."""
        with self._changed:
            return {path.name for path in (self._waiting, self._current) if path is not None}

    def finish(self) -> None:
        """From now on nothing waits: what fails is tried once more and given up."""
        with self._changed:
            self._finishing, self._moved = True, time.monotonic()
            self._changed.notify()

    def is_idle(self) -> bool:
        """Whether nothing is left to do, or no file has arrived for PATIENCE_S at the end."""
        with self._changed:
            if not self._working and self._waiting is None and self._forget is None:
                return True
            stuck = self._finishing and time.monotonic() - self._moved > PATIENCE_S
        if stuck:
            logger.warning("%s: given up: no file arrived in %.0f s", self._remote.url, PATIENCE_S)
        return stuck

    def _wake(self) -> None:
        self._moved = time.monotonic()
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="nsphere-upload", daemon=True)
            self._thread.start()
        self._changed.notify()

    def _work(self) -> None:
        failures = 0
        while True:
            with self._changed:
                self._changed.wait_for(
                    lambda: self._waiting is not None or self._forget is not None
                )
                forget, self._forget = self._forget, None
                self._current, self._waiting = self._waiting, None
                self._working = True
                last_try = self._finishing
            error = self._do(forget, self._current)
            failures = failures + 1 if error else 0
            with self._changed:
                failed, self._current = self._current if error else None, None
                self._working = False
                if failed is not None and not last_try:
                    self._waiting = self._waiting or failed
                    pause = min(600.0, self._pause_s * 2 ** (failures - 1))
                    self._changed.wait_for(lambda: self._finishing, timeout=pause)

    def _do(self, forget: int | None, checkpoint: Path | None) -> str:
        """What went wrong, told to people already, or ""."""
        started = time.monotonic()
        try:
            if forget is not None:
                self._remote.remove_after(forget)
            if checkpoint is None:
                return ""
            self._remote.upload(checkpoint, self._note_progress)
        except (RemoteError, OSError, ValueError) as error:
            name = checkpoint.name if checkpoint is not None else f"after step {forget}"
            logger.warning(
                "%s: not copied to the remote store, which has older ones at most: %s; training "
                "goes on and the newest is tried again",
                *(name, error),
            )
            details = {"step": _step_of(checkpoint), "error": str(error)}
            record_event(self._run, "upload_refused", details)
            return str(error)
        seconds = time.monotonic() - started
        logger.info("%s copied to %s in %.1f s", checkpoint, self._remote.url, seconds)
        step = _step_of(checkpoint)
        record_event(self._run, "uploaded", {"step": step, "seconds": seconds})
        try:
            self._remote.prune(self._keep_last, self._keep_every, step)
        except RemoteError as error:
            logger.warning("%s: old checkpoints stay there: %s", self._remote.url, error)
        return ""

    def _note_progress(self) -> None:
        with self._changed:
            self._moved = time.monotonic()


def _step_of(checkpoint: Path | None) -> int:
    return -1 if checkpoint is None else int(checkpoint.name.removeprefix("step-"))


def url_of(path: Path) -> str:
    """The URL that was given as a path ("s3:/bucket/run": pathlib folds slashes), or ""."""
    found = re.match(r"([a-z][a-z0-9+.-]+):/(.*)", str(path))
    if not found or path.exists():
        return ""
    scheme, rest = found.groups()
    return f"{scheme}:///{rest}" if scheme in ("file", "local") else f"{scheme}://{rest}"


def fetch_url(url: str) -> Path:
    """The newest whole checkpoint of a remote folder, or the one named; fetched into a cache.

    URL is checkpoint.remote of a run, or that with /step-00001234. Raises CheckpointError.
    """
    where, _, last = url.rstrip("/").rpartition("/")
    one = re.fullmatch(r"step-(\d{1,18})", last)
    try:
        remote = Remote(where if one else url)
        steps = [int(one[1])] if one else remote.steps()
        for step in reversed(steps):
            try:
                return _fetch_once(remote, step)
            except DamagedError as error:
                logger.warning("skipping %s", error)
    except (RemoteError, ConfigError, OSError) as error:
        raise CheckpointError(f"{url}: {error}") from None
    raise CheckpointError(
        f"{url}: no whole checkpoint there; give checkpoint.remote of a run, or one of its "
        "step-* folders"
    )


def _fetch_once(remote: Remote, step: int) -> Path:
    """As `Remote.fetch` into the user's cache; processes that want the same one wait."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    name = hashlib.sha256(remote.url.encode()).hexdigest()[:16]
    folder = Path(root) / "nsphere" / "checkpoints" / name
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        path = folder / step_name(step)
        found = remote.manifest(step)
        same = found is not None and (path / MANIFEST).is_file()
        if same and found is not None and (path / MANIFEST).read_bytes() == found[0]:
            if not check(path):
                return path
        for old in folder.glob("*step-*"):  # one a remote folder
            remove(old)
        return remote.fetch(step, folder)
