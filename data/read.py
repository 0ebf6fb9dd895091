"""Byte ranges of shards, wherever they lie: what the loader's workers read samples with.

Files are read by pread; remote stores by range, through the node's cache where there is one;
sources that cannot seek are written once to a plain tar on this node and read from there.
"""

import contextlib
import gzip
import logging
import os
import resource
import stat
import tempfile
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from data.cache import NodeCache
from data.errors import DataError
from data.remote import FileStore, Store, open_store
from data.retry import Retry
from data.web import Connections

LOG = logging.getLogger("nsphere.data")
Span = tuple[str, int, int]
"""Shard URL, offset in the (decompressed) tar, size."""
Version = tuple[int, str]
"""Size in bytes and ETag or modification time, as `Store.version` gives them."""

_PIECE_BYTES = 4 * 2**20
_SPOOL_BYTES = 2**20
FILE_GAP_BYTES = 8 * 1024  # reading on costs less than another system call
REMOTE_GAP_BYTES = 256 * 1024  # and here less than another request
_MAX_RUN_BYTES = 16 * 2**20
_MAX_FILES = 4096
_REMOTE_THREADS = 8
_UNKNOWN: Version = (-1, "")
_BROKEN_GZIP = (EOFError, gzip.BadGzipFile, zlib.error)


class Reader:
    """Reads spans of shards; opens what it needs in each process, and pickles without it.

    `versions` are the shards' versions when they were indexed: one that has changed since is a
    DataError that names it, never other bytes.
    """

    def __init__(
        self,
        *,
        cache_dir: Path | None = None,
        cache_bytes: int = 100 * 2**30,
        retries: int = 5,
        timeout_s: float = 60.0,
        versions: Mapping[str, Version] | None = None,
    ) -> None:
        self.cache_dir = cache_dir
        self.cache_bytes = cache_bytes
        self.retry = Retry(attempts=retries + 1, timeout_s=timeout_s)
        self.versions = dict(versions or {})
        self._start()

    def read_many(self, spans: Sequence[Span]) -> list[bytes | memoryview]:
        """The bytes of each span, in the order asked for; near ones are read together.

        Raises DataError for a shard that is gone, changed, or that does not answer.
        """
        if self._pid != os.getpid():  # a fork shares files and connections, and has no threads
            self._start()
        self._open_remote({shard for shard, _, _ in spans})
        found: list[bytes | memoryview] = [b""] * len(spans)
        files, remote = [], []
        for run in self._iter_runs(spans):
            if isinstance(run.store, FileStore):
                run.store.will_need(run.start, run.end - run.start)
                files.append(run)
            else:
                remote.append(run)
        for run in files:
            run.store = self._store(run.shard)  # a batch of many shards may have closed it again
            self._read_run(run, spans, found)
        if remote:  # waiting on a store takes no processor: side by side
            list(self._pool().map(partial(self._read_run, spans=spans, found=found), remote))
        return found

    def will_need(self, spans: Sequence[Span]) -> None:
        """Spans that are read soon: files are read ahead by the system, and remote pieces fetched
        into the node's cache, in order of shard and offset; without a cache these have no place.

        Nothing is raised here: what is wrong with a shard is told by the read that needs it.
        """
        if self._pid != os.getpid():
            self._start()
        keep = self.cache_dir is not None and self.cache_bytes
        wanted = [span for span in spans if keep or "://" not in span[0]]
        try:
            self._open_remote({shard for shard, _, _ in wanted})
            for run in self._iter_runs(wanted):
                if isinstance(run.store, FileStore):
                    run.store.will_need(run.start, run.end - run.start)
                else:
                    self._pool().submit(self._fetch_quietly, run)
        except (DataError, OSError) as error:
            LOG.info("reading ahead: %s", error)

    def _fetch_quietly(self, run: "_Run") -> None:
        with contextlib.suppress(DataError, OSError):
            self._read_remote(run.store, run.start, run.end - run.start)

    def size_of(self, shard: str) -> Version:
        """Size in bytes and version of a shard, as its place tells."""
        with closing(self._open(shard)) as store:
            return store.version()

    def close(self) -> None:
        """Close every open shard and connection."""
        for store in (*self._files.values(), *self._remote.values()):
            store.close()
        if self._threads is not None:
            self._threads.shutdown()
        self._connections.close()
        self._start()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if not name.startswith("_")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._start()

    def _start(self) -> None:
        self._pid = os.getpid()
        self._files: OrderedDict[str, FileStore] = OrderedDict()
        self._remote: dict[str, Store] = {}
        self._max_files = min(
            resource.getrlimit(resource.RLIMIT_NOFILE)[0] % 2**31 // 2, _MAX_FILES
        )
        self._connections = Connections()
        self._threads: ThreadPoolExecutor | None = None
        self._cache: NodeCache | None = None
        self._has_spooled = False

    def _pool(self) -> ThreadPoolExecutor:
        if self._threads is None:
            self._threads = ThreadPoolExecutor(_REMOTE_THREADS, "nsphere-read")
        return self._threads

    def _open_remote(self, shards: set[str]) -> None:
        # Each asks its server for a version first; one after the other that would add up.
        remote = [shard for shard in shards if "://" in shard and not self._find(shard)]
        if len(remote) > 1:
            for shard, store in zip(
                remote, self._pool().map(self._open_checked, remote), strict=True
            ):
                self._keep(shard, store)

    def _iter_runs(self, spans: Sequence[Span]) -> Iterator["_Run"]:
        """Spans that lie close together, to be read at once; in order of shard and offset."""
        for shard, start, end, members in coalesce(spans, self._gap):
            yield _Run(self._store(shard), shard, start, end, members)

    def _gap(self, shard: str) -> int:
        return FILE_GAP_BYTES if isinstance(self._store(shard), FileStore) else REMOTE_GAP_BYTES

    def _read_run(
        self, run: "_Run", spans: Sequence[Span], found: list[bytes | memoryview]
    ) -> None:
        """Read a run and put its members' bytes into their places in `found`."""
        size = run.end - run.start
        if isinstance(run.store, FileStore):
            data = run.store.read_at(run.start, size)
        else:
            data = self._read_remote(run.store, run.start, size)
        if len(data) < size:
            raise DataError(
                f"{run.shard}: ends at byte {run.start + len(data)}, but its index has a sample "
                f"that reaches to {run.end}; the shard was cut or replaced, start again"
            )
        if len(run.members) == 1:
            found[run.members[0]] = data
            return
        view = memoryview(data)
        for member in run.members:
            at = spans[member][1] - run.start
            found[member] = view[at : at + spans[member][2]]

    def _read_remote(self, store: Store, offset: int, size: int) -> bytes:
        if self.cache_dir is None or not self.cache_bytes:
            return store.read_at(offset, size)
        cache, version, pieces = self._node_cache(), store.version(), []
        for piece in range(offset // _PIECE_BYTES, -(-(offset + size) // _PIECE_BYTES)):
            at = piece * _PIECE_BYTES
            start, end = max(offset, at), min(offset + size, at + _PIECE_BYTES)
            key = f"{store.url}\0{version}\0{piece}"
            fetch = partial(store.read_at, at, _PIECE_BYTES)
            pieces.append(cache.read(key, start - at, end - start, fetch))
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _store(self, shard: str) -> Store:
        return self._find(shard) or self._keep(shard, self._open_checked(shard))

    def _find(self, shard: str) -> Store | None:
        store = self._files.get(shard)
        if store is None:
            return self._remote.get(shard)
        self._files.move_to_end(shard)
        return store

    def _keep(self, shard: str, store: Store) -> Store:
        if isinstance(store, FileStore):
            self._files[shard] = store
            if len(self._files) > self._max_files:
                self._files.popitem(last=False)[1].close()
        else:
            self._remote[shard] = store
        return store

    def _open_checked(self, shard: str) -> Store:
        """The store of a shard, a spool of it where it cannot seek."""
        store = self._open(shard)
        version, indexed = store.version(), self.versions.get(shard)
        if version == _UNKNOWN:
            version = indexed or _UNKNOWN
        elif indexed is not None and indexed != version:
            raise DataError(
                f"{shard}: changed since it was indexed: (size, version) was {indexed}, is "
                f"{version}; start again to index it anew"
            )
        return store if store.seekable else self._spooled(store, version)

    def _open(self, shard: str) -> Store:
        return open_store(shard, retry=self.retry, connections=self._connections)

    def _spooled(self, store: Store, version: Version) -> Store:
        """The decompressed shard as a file: one for the node if its version is known."""
        if not self._has_spooled:  # once a process, not once a shard
            self._has_spooled = True
            LOG.warning(
                "%s cannot be read by offset; such shards are read once, from front to back, and "
                "kept as plain tars on this node",
                store.url,
            )
        if version == _UNKNOWN:  # what an earlier run has kept may be something else
            with tempfile.TemporaryFile(dir=self._node_cache().folder) as file:
                _write_stream(store, file.fileno())
                return FileStore(store.url, os.dup(file.fileno()))
        key = f"{store.url}\0{version}"
        fill = partial(_write_stream, store)
        fd, path = self._node_cache().spool(key, fill)
        return FileStore(path, fd)

    def _node_cache(self) -> NodeCache:
        if self._cache is None:
            self._cache = NodeCache(self.cache_dir or _private_folder(), self.cache_bytes)
        return self._cache


@dataclass(slots=True)
class _Run:
    """Bytes of one shard that are read at once, and the spans that want them."""

    store: Store
    shard: str
    start: int
    end: int
    members: list[int]


def coalesce(
    spans: Sequence[Span],
    gap_of: Callable[[str], int],  # shard -> bytes that it is cheaper to read on over
) -> Iterator[tuple[str, int, int, list[int]]]:
    """Reads that fetch all spans: shard, first byte, end, numbers of the spans; in that order."""
    shard, start, end, members = "", 0, 0, list[int]()
    for member in sorted(range(len(spans)), key=spans.__getitem__):
        where, offset, size = spans[member]
        near = where == shard and offset <= end + gap_of(where)
        if members and near and offset + size - start <= _MAX_RUN_BYTES:
            members.append(member)
            end = max(end, offset + size)
            continue
        if members:
            yield shard, start, end, members
        shard, start, end, members = where, offset, offset + size, [member]
    if members:
        yield shard, start, end, members


def _write_stream(store: Store, fd: int) -> None:
    stream: Any = store.stream()
    with stream:
        while True:
            try:
                data = stream.read1(_SPOOL_BYTES)
            except _BROKEN_GZIP as error:  # the index has what comes before the break, and says so
                LOG.warning("%s: the compressed stream is broken: %s", store.url, error)
                return
            if not data:
                return
            while data:
                data = data[os.write(fd, data) :]


def _private_folder() -> Path:
    """A folder for spools below the system's temporary one, that nobody else can fill."""
    folder = Path(tempfile.gettempdir()) / f"nsphere-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
        raise DataError(f"{folder} belongs to somebody else; set data.cache_dir")
    return folder
