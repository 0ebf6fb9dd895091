"""The node's cache: pieces of remote shards, and whole shards that can only be streamed.

All processes of a node share one folder. A file appears by one rename, blocks of a piece carry
checksums that are verified on every read, and the sum of all files stays below the limit: the
least recently used go first.
"""

import fcntl
import logging
import os
import struct
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path

import numpy as np

from data.errors import DataError

LOG = logging.getLogger("nsphere.data")
_MAGIC = b"nsP1"
_HEAD = struct.Struct("<4sII")  # magic, payload bytes, crc32 of the table
_BLOCK_BYTES = 16 * 1024
_TOUCH_AFTER_S = 60.0
_EVICT_TO = 0.9
_NUM_LOCKS = 256
_PARTIAL = ".partial"
_ABANDONED_AFTER_S = 3600.0


class NodeCache:
    """A folder of pieces and spools under a byte limit; safe among processes and threads."""

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self.folder = folder
        self.limit_bytes = limit_bytes
        try:
            for name in ("pieces", "spools", "locks"):
                (folder / name).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"data.cache_dir {folder}: {error.strerror}") from None

    def read(self, key: str, start: int, size: int, fetch: Callable[[], bytes]) -> bytes:
        """`size` bytes from `start` of the piece `key`; `fetch` brings the piece if it is not here.

        One process of the node fetches, the others wait for it.
        """
        path = self._path("pieces", key)
        data = self._read_verified(path, start, size)
        if data is not None:
            return data
        with self._locked(f"{int(path.name[:8], 16) % _NUM_LOCKS:02x}"):
            data = self._read_verified(path, start, size)
            if data is not None:
                return data
            piece = fetch()
            self._store(path, piece)
        return piece[start : start + size]

    def spool(self, key: str, fill: Callable[[int], None]) -> tuple[int, str]:
        """Descriptor and path of the file that `fill(descriptor)` writes, once for the node."""
        path = self._path("spools", key)
        with self._locked(f"spool-{path.name}"):
            if path.exists():
                os.utime(path)
            else:
                self._fill(path, fill)
            return os.open(path, os.O_RDONLY | os.O_CLOEXEC), str(path)

    def _fill(self, path: Path, fill: Callable[[int], None]) -> None:
        partial = path.with_suffix(_PARTIAL)  # ours alone: we hold its lock
        fd = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        try:
            fill(fd)
            size = os.fstat(fd).st_size
        except BaseException:
            partial.unlink()
            raise
        finally:
            os.close(fd)
        os.replace(partial, path)
        self._account(size, keep=path)

    def _path(self, kind: str, key: str) -> Path:
        return self.folder / kind / blake2b(key.encode(), digest_size=20).hexdigest()

    def _read_verified(self, path: Path, start: int, size: int) -> bytes | None:
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            data = _read_blocks(fd, start, size)
            if time.time() - os.fstat(fd).st_mtime > _TOUCH_AFTER_S:
                os.utime(fd)
        finally:
            os.close(fd)
        if data is None:
            LOG.warning("%s: a cached piece was damaged; it is fetched again", path)
            path.unlink(missing_ok=True)
        return data

    def _store(self, path: Path, piece: bytes) -> None:
        crcs = [
            zlib.crc32(piece[at : at + _BLOCK_BYTES]) for at in range(0, len(piece), _BLOCK_BYTES)
        ]
        table = np.array(crcs, "<u4").tobytes()
        head = _HEAD.pack(_MAGIC, len(piece), zlib.crc32(table))
        partial = path.with_suffix(_PARTIAL)
        try:
            partial.write_bytes(head + table + piece)
            os.replace(partial, path)
            self._account(len(head) + len(table) + len(piece), keep=path)
        except OSError as error:  # a full disk costs the cache, not the run
            LOG.warning("%s: not cached: %s", self.folder, error)
            partial.unlink(missing_ok=True)

    def _account(self, added_bytes: int, keep: Path) -> None:
        with self._locked("account"):
            counter = self.folder / "bytes"
            try:
                total = int(counter.read_text()) + added_bytes
            except (FileNotFoundError, ValueError):
                total = self.limit_bytes + 1  # unknown: count the files
            if total > self.limit_bytes:
                total = self._evict(keep)
            counter.write_text(str(total))

    def _evict(self, keep: Path) -> int:
        """Remove the least recently used files; the bytes that are left."""
        found = sorted(_iter_files(self.folder / "pieces", self.folder / "spools"))
        total = sum(size for _, size, _ in found)
        goal = self.limit_bytes if total <= self.limit_bytes else _EVICT_TO * self.limit_bytes
        for _, size, path in found:
            if total <= goal:
                break
            if path != str(keep):
                Path(path).unlink(missing_ok=True)
                total -= size
        return total

    @contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        # A lock belongs to the open file, so threads of one process exclude each other too, and
        # a killed process leaves none behind.
        fd = os.open(self.folder / "locks" / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)


def _read_blocks(fd: int, start: int, size: int) -> bytes | None:
    """`size` bytes from `start` of a piece file, or None when a checksum does not fit."""
    head = os.pread(fd, _HEAD.size, 0)
    if len(head) < _HEAD.size:
        return None
    magic, total, table_crc = _HEAD.unpack(head)
    num_blocks = -(-total // _BLOCK_BYTES)
    table = os.pread(fd, 4 * num_blocks, _HEAD.size)
    if magic != _MAGIC or len(table) != 4 * num_blocks or zlib.crc32(table) != table_crc:
        return None
    end = min(start + size, total)
    if start >= end:
        return b""
    first, last = start // _BLOCK_BYTES, -(-end // _BLOCK_BYTES)
    data_at = _HEAD.size + len(table) + first * _BLOCK_BYTES
    data = os.pread(fd, min(last * _BLOCK_BYTES, total) - first * _BLOCK_BYTES, data_at)
    view = memoryview(data)
    for block, crc in enumerate(np.frombuffer(table, "<u4")[first:last].tolist()):
        if zlib.crc32(view[block * _BLOCK_BYTES : (block + 1) * _BLOCK_BYTES]) != crc:
            return None
    skipped = start - first * _BLOCK_BYTES
    return data[skipped : skipped + end - start]


def _iter_files(*folders: Path) -> Iterator[tuple[int, int, str]]:
    """(time of last use in ns, bytes, path) of each file."""
    for folder in folders:
        with os.scandir(folder) as entries:
            for entry in entries:
                try:
                    status = entry.stat()
                except FileNotFoundError:  # another process has evicted it
                    continue
                age_s = time.time() - status.st_mtime
                if entry.name.endswith(_PARTIAL) and age_s < _ABANDONED_AFTER_S:
                    continue  # being written
                yield status.st_mtime_ns, status.st_size, entry.path
