"""RUN/.lock: one run at a time writes a folder, and the file says whose it is.

The kernel's lock is the proof where it reaches every host: on a local file system, and on network
ones that carry locks. Where it may not (NFS mounted with `nolock` or `local_lock`, Lustre without
`flock`, FUSE and others unknown), a run of another host is told by the heartbeat in the file; an
owner whose heartbeat stands still is dead and no obstacle.
"""

import errno
import fcntl
import json
import logging
import os
import socket
import threading
import time
import uuid
import weakref
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trainer.config import ConfigError

LOCK_FILE = ".lock"
BEAT_S = 5.0
SILENT_S = 30.0  # a heartbeat that stands still for so long is a dead owner's
LEASE_S = 150.0  # a file server frees a dead host's locks after its lease (NFSv4: 90 s)

# `man 2 flock`: these either know one host only, or carry locks between hosts.
_REACHING = {
    "ext2", "ext3", "ext4", "xfs", "btrfs", "tmpfs", "ramfs", "overlay", "zfs", "f2fs", "jfs",
    "bcachefs", "squashfs", "ceph", "gpfs", "ocfs2", "gfs2",
}  # fmt: skip
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)

logger = logging.getLogger("nsphere.run")


@dataclass(frozen=True)
class Owner:
    """Who holds a run folder, as its .lock says."""

    pid: int
    host: str
    since: str  # local time of its host
    job: str = ""  # of SLURM
    token: str = ""  # of this holding alone
    beat: int = 0  # counts up while the owner lives

    def __str__(self) -> str:
        job = f", SLURM job {self.job}" if self.job else ""
        return f"process {self.pid} on {self.host}{job}, since {self.since}"


def read_owner(path: Path) -> Owner | None:
    """The owner that a .lock names; None for one that is free, absent or torn."""
    try:
        return Owner(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return None


def locks_reach(path: Path, mounts: str | None = None) -> tuple[bool, str]:
    """Whether a lock on `path` is seen by every host that mounts it, and the file system's name.

    `mounts`: the text of /proc/self/mountinfo. Where nothing is known the answer is no.
    """
    try:
        text = Path("/proc/self/mountinfo").read_text() if mounts is None else mounts
    except OSError:
        return False, "unknown"
    best, kind, options = "", "unknown", ""
    for line in text.splitlines():
        before, _, after = line.partition(" - ")
        where = before.split()[4].encode().decode("unicode_escape")
        inside = where == "/" or f"{path.absolute()}/".startswith(f"{where}/")
        if inside and len(where) >= len(best):
            fields = after.split()
            best, kind = where, fields[0]
            options = ",".join([before.split()[5], *fields[2:]])
    words = options.split(",")
    if kind in ("nfs", "nfs4"):
        return not {"nolock", "local_lock=all", "local_lock=flock"} & set(words), kind
    if kind == "lustre":
        return "flock" in words, kind
    return kind in _REACHING, kind


class RunLock:
    """The holding of a run folder by this process, from `RunLock(path)` to `close`."""

    def __init__(self, path: Path, *, reaches: bool | None = None) -> None:
        """Take the lock, or raise ConfigError naming the owner.

        `reaches`: as `locks_reach` finds it. Waits up to SILENT_S where only the heartbeat tells
        whether the last owner, on another host, is alive.
        """
        self._path = path
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        self._closed = threading.Event()
        found, kind = locks_reach(path)
        reaches = found if reaches is None else reaches
        try:
            self._take(reaches=self._lock() and reaches, kind=kind)
        except BaseException:
            os.close(self._fd)
            raise
        _leave_behind_at_fork(self)
        self._thread = threading.Thread(target=self._beat, name="nsphere-lock", daemon=True)
        self._thread.start()

    def _lock(self) -> bool:
        """False where the file system has no locks at all."""
        until = time.monotonic() + LEASE_S
        while True:
            try:
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            except OSError as error:
                if error.errno in _NO_LOCKS:
                    return False
            owner = read_owner(self._path)
            here = owner is None or owner.host == socket.gethostname()
            if here or time.monotonic() > until:
                raise _in_use(self._path, owner or "another process")
            self._wait_for_silence("another host holds it, a dead one perhaps")

    def _take(self, *, reaches: bool, kind: str) -> None:
        if not reaches:
            self._wait_for_silence(f"locks may not reach other hosts (file system {kind})")
        self._owner = Owner(
            os.getpid(),
            socket.gethostname(),
            time.strftime("%Y-%m-%d %H:%M:%S"),
            os.environ.get("SLURM_JOB_ID", ""),
            uuid.uuid4().hex,
        )
        self._write(asdict(self._owner))
        if not reaches:  # another host may have found it free in the same moment
            time.sleep(1.0)
            if problem := self.lost_to():
                raise ConfigError(problem)

    def _wait_for_silence(self, why: str) -> None:
        first = read_owner(self._path)
        if first is None or (first.host == socket.gethostname() and not _is_alive(first.pid)):
            return
        logger.warning(
            "%s: %s; watching the heartbeat of %s for %.0f s",
            *(self._path, why, first, SILENT_S),
        )
        until = time.monotonic() + SILENT_S
        while time.monotonic() < until:
            time.sleep(0.5)
            now = read_owner(self._path)
            if now is None:
                return  # closed
            if (now.token, now.beat) != (first.token, first.beat):
                raise _in_use(self._path, now)
        logger.warning("%s: %s is gone; its lock is taken over", self._path, first)

    @property
    def token(self) -> str:
        """Of this holding: whoever reads another one in the file does not see this folder."""
        return self._owner.token

    def lost_to(self) -> str:
        """Why this process may not write the folder any more, or ""."""
        owner = read_owner(self._path)
        if owner is None or owner.token == self._owner.token:
            return ""
        return f"{self._path.parent} has been taken over by {owner}: nothing is written here"

    def _beat(self) -> None:
        beat = 0
        while not self._closed.wait(BEAT_S):
            beat += 1
            try:
                if not self.lost_to():
                    self._write({**asdict(self._owner), "beat": beat})
            except OSError as error:  # a full disk, a lost folder: the next save says so
                logger.info("%s: no heartbeat: %s", self._path, error)

    def _write(self, owner: dict[str, Any]) -> None:
        """In place: a file that replaces it would not be the one that is locked."""
        text = json.dumps(owner).encode().ljust(512)
        os.pwrite(self._fd, text, 0)

    def close(self) -> None:
        """Let go; the next run need not wait for a heartbeat. A second call does nothing."""
        if self._closed.is_set():
            return
        self._closed.set()
        self._thread.join()
        try:
            if not self.lost_to():
                os.ftruncate(self._fd, 0)
        except OSError as error:
            logger.info("%s: not cleared: %s", self._path, error)
        os.close(self._fd)

    def leave(self) -> None:
        """In a forked child: the lock is the parent's, and must end with it."""
        if not self._closed.is_set():
            os.close(self._fd)


def _leave_behind_at_fork(lock: RunLock) -> None:
    known = weakref.ref(lock)

    def leave() -> None:
        mine = known()
        if mine is not None:
            mine.leave()

    os.register_at_fork(after_in_child=leave)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _in_use(path: Path, owner: Owner | str) -> ConfigError:
    return ConfigError(
        f"{path.parent} is in use by {owner}: wait for it to end, or name another --run"
    )
