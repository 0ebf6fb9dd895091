"""One interface over the places a shard can lie: files, http(s), fsspec stores, pipes, gzip.

A store reads bytes by offset (`read_at`) where the place can seek, and from front to back
(`stream`) always. What is read is cached elsewhere (`data/cache.py`, `data/read.py`).
"""

import gzip
import os
from collections.abc import Callable
from typing import BinaryIO, Protocol, cast
from urllib.parse import urlsplit

from data.errors import DataError


class Store(Protocol):
    """One shard in its place. Pickles as its URL: no open file or connection crosses a process."""

    url: str

    @property
    def seekable(self) -> bool:
        """False where `read_at` is impossible: `pipe:`, gzip, a server without byte ranges."""

    def version(self) -> tuple[int, str]:
        """Size in bytes (-1 when unknown) and ETag or modification time ("" when unknown)."""

    def read_at(self, offset: int, size: int) -> bytes:
        """`size` bytes from `offset`; fewer only at the end of the shard."""

    def stream(self) -> BinaryIO:
        """The whole shard as a decompressed tar, from front to back."""

    def close(self) -> None:
        """Drop open files and connections; the store opens them again when it is used."""


class FileStore:
    """A file on this machine or on a mounted file system."""

    seekable = True

    def __init__(self, url: str) -> None:
        self.url = url
        self.path = _local_path(url)
        self._fd = -1

    def version(self) -> tuple[int, str]:
        """Size and modification time in nanoseconds."""
        status = os.fstat(self._open())
        return status.st_size, str(status.st_mtime_ns)

    def read_at(self, offset: int, size: int) -> bytes:
        """`size` bytes from `offset`; fewer only at the end of the shard."""
        fd = self._fd if self._fd >= 0 else self._open()
        data = os.pread(fd, size, offset)
        if len(data) == size:
            return data
        return self._read_rest(data, offset, size)

    def _read_rest(self, data: bytes, offset: int, size: int) -> bytes:
        # One pread returns at most 2 GiB, and network file systems may return less.
        pieces, have = [data], len(data)
        while have < size and pieces[-1]:
            pieces.append(os.pread(self._fd, size - have, offset + have))
            have += len(pieces[-1])
        return b"".join(pieces)

    def stream(self) -> BinaryIO:
        """The file, opened apart from `read_at`'s."""
        self._open()
        return open(self.path, "rb")

    def close(self) -> None:
        """Close the file."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def _open(self) -> int:
        if self._fd < 0:
            try:
                self._fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
            except OSError as error:
                raise DataError(f"{self.url}: {error.strerror}") from None
        return self._fd

    def __del__(self) -> None:
        self.close()

    def __reduce__(self) -> tuple[Callable[[str], "FileStore"], tuple[str]]:
        return FileStore, (self.url,)


class GzipStore:
    """A gzipped tar in any place: read from front to back only."""

    seekable = False

    def __init__(self, inner: Store) -> None:
        self.url = inner.url
        self.inner = inner

    def version(self) -> tuple[int, str]:
        """Of the compressed file."""
        return self.inner.version()

    def read_at(self, offset: int, size: int) -> bytes:
        """Raises DataError: gzip has no offsets."""
        raise DataError(f"{self.url}: gzip cannot be read by offset; read its stream()")

    def stream(self) -> BinaryIO:
        """The decompressed tar."""
        return cast(BinaryIO, gzip.GzipFile(fileobj=self.inner.stream(), mode="rb"))

    def close(self) -> None:
        """Close the compressed file."""
        self.inner.close()


def open_store(url: str) -> Store:
    """The store of a shard, by the form of its URL; nothing is opened before it is read."""
    store = FileStore(url)
    return GzipStore(store) if is_gzip(url) else store


def is_gzip(url: str) -> bool:
    """Whether the shard's name says that it is compressed."""
    path = url if url.startswith("pipe:") else urlsplit(url).path
    return path.lower().endswith((".gz", ".tgz"))


def _local_path(url: str) -> str:
    return url.removeprefix("file://") if url.startswith("file://") else url
