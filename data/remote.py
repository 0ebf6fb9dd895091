"""One interface over the places a shard can lie: files, http(s), fsspec stores, pipes, gzip.

A store reads bytes by offset (`read_at`) where the place can seek, and from front to back
(`stream`) always. What is read is cached elsewhere (`data/cache.py`, `data/read.py`).
"""

import gzip
import io
import os
from functools import partial
from typing import Any, BinaryIO, Protocol, cast
from urllib.parse import unquote, urlsplit

import fsspec
import fsspec.asyn

from data.errors import DataError
from data.retry import Retry, TransientError
from data.web import Connections, HttpStore

_STREAM_BYTES = 4 * 2**20
_VERSION_FIELDS = (
    "ETag", "etag", "md5Hash", "md5", "generation", "mtime", "LastModified", "last_modified",
    "updated", "created",
)  # fmt: skip


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
    """A file on this machine or on a mounted file system; `fd` is one that is open already."""

    seekable = True

    def __init__(self, url: str, fd: int = -1) -> None:
        self._fd = fd
        self.url = url
        self.path = _local_path(url)

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

    def will_need(self, offset: int, size: int) -> None:
        """Let the system read ahead, so that the reads of a batch do not wait for each other."""
        os.posix_fadvise(self._open(), offset, size, os.POSIX_FADV_WILLNEED)

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

    def __reduce__(self) -> tuple[type["FileStore"], tuple[str]]:
        return FileStore, (self.url,)


class FsspecStore:
    """A shard in any store that fsspec knows: `s3://`, `gs://`, `hf://`, `memory://`, ..."""

    seekable = True

    def __init__(self, url: str, retry: Retry) -> None:
        self.url = url
        self.retry = retry
        self._opened: tuple[int, Any, str] | None = None
        self._version: tuple[int, str] | None = None

    def version(self) -> tuple[int, str]:
        """Size and the first of ETag, checksum or time that the store tells."""
        if self._version is None:
            info = self.retry.run(self.url, lambda: self._call("info"))
            tags = (str(info[name]) for name in _VERSION_FIELDS if info.get(name))
            size = info.get("size")
            self._version = (-1 if size is None else int(size)), next(tags, "")
        return self._version

    def read_at(self, offset: int, size: int) -> bytes:
        """`size` bytes from `offset`; fewer only at the end of the shard."""
        total = self.version()[0]
        size = size if total < 0 else max(0, min(size, total - offset))
        have = b""
        while len(have) < size:
            rest = partial(self._call, "cat_file", start=offset + len(have), end=offset + size)
            piece = self.retry.run(self.url, rest)
            if not piece:
                break
            have += piece
        return have

    def stream(self) -> BinaryIO:
        """The whole object, by ranges."""
        return cast(BinaryIO, io.BufferedReader(RangeStream(self), _STREAM_BYTES))

    def close(self) -> None:
        """Forget the file system; fsspec keeps its own connections."""
        self._opened = None

    def _call(self, method: str, **span: int) -> Any:
        system, path = self._file_system()
        try:
            if system.async_impl:  # the only way to put a deadline on it
                call = getattr(system, f"_{method}")
                return fsspec.asyn.sync(
                    system.loop, call, path, timeout=self.retry.timeout_s, **span
                )
            return getattr(system, method)(path, **span)
        except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
            raise DataError(f"{self.url}: {_reason(error)}") from None
        except Exception as error:  # noqa: BLE001 - each store has errors of its own
            raise TransientError(_reason(error)) from None

    def _file_system(self) -> tuple[Any, str]:
        # A file system's event loop does not survive a fork, so it belongs to one process.
        if self._opened is None or self._opened[0] != os.getpid():
            try:
                self._opened = (os.getpid(), *fsspec.core.url_to_fs(self.url))
            except (ImportError, ValueError) as error:
                raise DataError(f"{self.url}: {_reason(error)}") from None
        return self._opened[1], self._opened[2]

    def __reduce__(self) -> tuple[type["FsspecStore"], tuple[str, Retry]]:
        return FsspecStore, (self.url, self.retry)


class PipeStore:
    """What a shell command prints: `pipe:COMMAND`, through webdataset's gopen."""

    seekable = False

    def __init__(self, url: str) -> None:
        self.url = url

    def version(self) -> tuple[int, str]:
        """Unknown: (-1, "")."""
        return -1, ""

    def read_at(self, offset: int, size: int) -> bytes:  # noqa: ARG002
        """Raises DataError: a pipe has no offsets."""
        raise DataError(f"{self.url}: a pipe cannot be read by offset; read its stream()")

    def stream(self) -> BinaryIO:
        """The command's output, decompressed; its failure is a DataError at the end."""
        return _decompressed(cast(BinaryIO, _PipeStream(self.url)))

    def close(self) -> None:
        """Nothing is kept open."""


class GzipStore:
    """A gzipped tar in any place: read from front to back only."""

    seekable = False

    def __init__(self, inner: Store) -> None:
        self.url = inner.url
        self.inner = inner

    def version(self) -> tuple[int, str]:
        """Of the compressed file."""
        return self.inner.version()

    def read_at(self, offset: int, size: int) -> bytes:  # noqa: ARG002
        """Raises DataError: gzip has no offsets."""
        raise DataError(f"{self.url}: gzip cannot be read by offset; read its stream()")

    def stream(self) -> BinaryIO:
        """The decompressed tar."""
        return _decompressed(self.inner.stream())

    def close(self) -> None:
        """Close the compressed file."""
        self.inner.close()


class RangeStream(io.RawIOBase):
    """A seekable store as a stream from front to back."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._position = 0

    def readable(self) -> bool:
        """True."""
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        """The next bytes; a short read is the end."""
        piece = self._store.read_at(self._position, len(buffer))
        buffer[: len(piece)] = piece
        self._position += len(piece)
        return len(piece)


class _PipeStream(io.RawIOBase):
    def __init__(self, url: str) -> None:
        from webdataset.gopen import gopen  # imports torch and more: only where there are pipes

        self._url = url
        self._pipe = gopen(url, "rb")
        self._has_ended = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        if self._has_ended:
            return 0
        try:
            piece = self._pipe.read(len(buffer))
            if not piece:
                self._has_ended = True
                self._pipe.close()  # waits for the exit status, which read() may be too early for
        except OSError:
            status = self._pipe.proc.wait()
            raise DataError(f"{self._url}: the command failed with exit status {status}") from None
        buffer[: len(piece)] = piece
        return len(piece)

    def close(self) -> None:
        if not self.closed and not self._has_ended:  # a reader that stops early ends the command
            self._pipe.ignore_errors = True
            self._pipe.proc.terminate()
            self._pipe.close()
        super().close()


def open_store(
    url: str, *, retry: Retry | None = None, connections: Connections | None = None
) -> Store:
    """The store of a shard, by the form of its URL; nothing is opened before it is read.

    `connections` lets http stores share theirs; without it each keeps its own.
    """
    store = _open_plain(url, retry or Retry(), connections)
    return GzipStore(store) if is_gzip(url) else store


def is_gzip(url: str) -> bool:
    """Whether the shard's name says that it is compressed."""
    if url.startswith("pipe:"):
        return False  # the command may decompress: its first bytes tell
    path = urlsplit(url).path if "://" in url else url
    return path.lower().endswith((".gz", ".tgz"))


def _open_plain(url: str, retry: Retry, connections: Connections | None) -> Store:
    if url.startswith("pipe:"):
        return PipeStore(url)
    if url.startswith(("http://", "https://")):
        return HttpStore(url, retry, connections)
    if "://" in url and not url.startswith("file://"):
        return FsspecStore(url, retry)
    return FileStore(url)


def _decompressed(stream: BinaryIO) -> BinaryIO:
    buffered = io.BufferedReader(cast(io.RawIOBase, stream), _STREAM_BYTES)
    if buffered.peek(2)[:2] == b"\x1f\x8b":
        return cast(BinaryIO, gzip.GzipFile(fileobj=buffered, mode="rb"))
    return cast(BinaryIO, buffered)


def _local_path(url: str) -> str:
    path = unquote(urlsplit(url).path) if url.startswith("file:") else url
    return os.path.expanduser(path)


def _reason(error: BaseException) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__
