"""Shards -> tables: what is already indexed is found again, the rest is read once, in parallel."""

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import closing
from io import BufferedIOBase
from typing import cast

from data.errors import DataError
from data.remote import Store, open_store
from data.rows import Keys, RowBuilder
from data.scan_pool import ScanPool
from data.shards import local_path
from data.table import ShardTable, Source, find_table, save_table
from data.tar import Fault, ForwardReads, Window, iter_members
from data.usable import shorten

Progress = Callable[[int, int], None]
"""Called with (shards done, shards in all)."""

_LOCAL_WINDOW_BYTES = 4096  # the small members that follow an image, in one read
_REMOTE_WINDOW_BYTES = 4 << 20  # requests cost more than bytes
_PROCESSES_FROM_BYTES = 8 << 30  # below, starting processes costs more than it saves


def index_shards(
    shards: Sequence[str], keys: Keys, *, fresh: bool, workers: int, progress: Progress | None
) -> list[ShardTable]:
    """The table of every shard, in order. `fresh` scans also what is already indexed.

    `workers` 0 takes every core this process may use; large local sets are scanned by processes.
    Raises DataError for a shard that cannot be read.
    """
    workers = workers or len(os.sched_getaffinity(0))
    tables: dict[str, ShardTable] = {}
    pending: list[Source] = []
    with ThreadPoolExecutor(max(workers, 16)) as threads:
        for source, table in threads.map(_look_up, shards, [keys] * len(shards)):
            if table is None or fresh:
                pending.append(source)
            else:
                tables[source.url] = table
    for table in _scan_all(pending, keys, workers):
        tables[table.source.url] = table
        if progress is not None:
            progress(len(tables), len(shards))
    if progress is not None and not pending:
        progress(len(shards), len(shards))
    return [tables[shard] for shard in shards]


def scan_shard(url: str, keys: Keys) -> ShardTable:
    """Read one shard's headers, write its index, return it without its rows."""
    store = open_store(url)
    with closing(store):
        source = _source(store)
        builder = RowBuilder(keys)
        if store.seekable:
            local = local_path(url) is not None
            window_bytes = _LOCAL_WINDOW_BYTES if local else _REMOTE_WINDOW_BYTES
            _walk(Window(store.read_at, lambda: source.size_bytes, window_bytes), builder)
        else:
            builder = _walk_stream(store, builder, keys)
    rows, notes = builder.finish()
    return save_table(source, keys, rows, shorten(notes), builder.json_fields)


def _walk(window: Window, builder: RowBuilder) -> None:
    for found in iter_members(window):
        if isinstance(found, Fault):
            builder.add_fault(found)
        else:
            builder.add(found, window.at)


def _walk_stream(store: Store, builder: RowBuilder, keys: Keys) -> RowBuilder:
    with store.stream() as stream:
        reads = ForwardReads(cast(BufferedIOBase, stream))
        _walk(Window(reads.read_at, reads.end, _REMOTE_WINDOW_BYTES), builder)
    if not reads.failure:
        return builder
    if reads.garbled:  # any byte may be wrong, so no sample is certain
        builder = RowBuilder(keys)
    builder.add_fault(Fault("compression", reads.end(), f"the stream broke off: {reads.failure}"))
    return builder


def _look_up(url: str, keys: Keys) -> tuple[Source, ShardTable | None]:
    store = open_store(url)
    with closing(store):
        source = _source(store)
    return source, find_table(source, keys)


def _source(store: Store) -> Source:
    size_bytes, version = store.version()
    return Source(store.url, size_bytes, version, store.seekable)


def _scan_all(pending: Sequence[Source], keys: Keys, workers: int) -> Iterator[ShardTable]:
    workers = min(workers, len(pending))
    local = sum(s.size_bytes for s in pending if s.seekable and local_path(s.url) is not None)
    if workers < 2:
        yield from (scan_shard(source.url, keys) for source in pending)
    elif local >= _PROCESSES_FROM_BYTES:
        with ScanPool(workers) as pool:
            scans = [pool.threads.submit(_scan_apart, pool, source, keys) for source in pending]
            yield from (scan.result() for scan in as_completed(scans))
    else:  # threads wait for stores, and gzip runs beside Python
        with ThreadPoolExecutor(workers) as threads:
            scans = [threads.submit(scan_shard, source.url, keys) for source in pending]
            try:
                yield from (scan.result() for scan in as_completed(scans))
            finally:
                threads.shutdown(cancel_futures=True)


def _scan_apart(pool: ScanPool, source: Source, keys: Keys) -> ShardTable:
    pool.scan(source.url, keys)
    table = find_table(source, keys)
    return scan_shard(source.url, keys) if table is None else table  # None: changed meanwhile


def _answer_lines() -> None:
    """What a child of `ScanPool` does: [url, *keys] a line in, "" or an error a line out."""
    for line in sys.stdin:
        url, *keys = json.loads(line)
        try:
            scan_shard(url, Keys(*keys))
            reply = ""
        except DataError as error:
            reply = str(error)
        sys.stdout.write(json.dumps(reply) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    _answer_lines()
