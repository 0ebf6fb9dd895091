"""Byte ranges of shards, wherever they lie: what the loader's workers read samples with."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from data.remote import Store, open_store

Span = tuple[str, int, int]
"""Shard URL, offset in the tar, size."""


class Reader:
    """Reads spans of shards; made in each worker, and pickles without its open files.

    `versions` are the (size, version) of the shards when they were indexed: a shard that has
    changed since is a DataError that names it, never other bytes.
    """

    def __init__(
        self,
        *,
        cache_dir: Path | None = None,
        cache_bytes: int = 100 * 2**30,
        retries: int = 5,
        timeout_s: float = 60.0,
        versions: Mapping[str, tuple[int, str]] | None = None,
    ) -> None:
        self.cache_dir = cache_dir
        self.cache_bytes = cache_bytes
        self.retries = retries
        self.timeout_s = timeout_s
        self.versions = dict(versions or {})
        self._stores: dict[str, Store] = {}

    def read_many(self, spans: Sequence[Span]) -> list[bytes | memoryview]:
        """The bytes of each span, in the order asked for.

        Raises DataError for a shard that is gone, changed, or that does not answer.
        """
        return [self._store(shard).read_at(offset, size) for shard, offset, size in spans]

    def size_of(self, shard: str) -> tuple[int, str]:
        """Size in bytes and version text of a shard, as its store tells."""
        return self._store(shard).version()

    def close(self) -> None:
        """Close every open shard."""
        while self._stores:
            self._stores.popitem()[1].close()

    def _store(self, shard: str) -> Store:
        store = self._stores.get(shard)
        if store is None:
            store = self._stores[shard] = open_store(shard)
        return store
