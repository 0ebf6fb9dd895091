"""A training set: indexes, an order for each, and their mix, as one function position -> sample."""

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data.index import Entry, Index
from data.mix import Mix
from data.order import ORDER_VERSION, BatchOf, Order, check_batch_size, equal_batches

Int64s = NDArray[np.int64]


class Rows(NamedTuple):
    """What stands at some positions of the run's stream of samples."""

    positions: Int64s  # (n,) samples that the whole job consumed before this one
    sources: Int64s  # (n,)
    epochs: Int64s  # (n,) epoch of the source
    ids: Int64s  # (n,) sample id over all sources


class SampleSet:
    """Indexed sources as one set; a sample's id is its source's offset plus its id in the index."""

    def __init__(
        self,
        indexes: Sequence[Index],
        *,
        seed: int,
        weights: Sequence[float] = (1.0,),
        chunk: int = 64,
        lanes: int = 64,
        window: int = 64,
    ) -> None:
        if len(indexes) != len(weights) or not indexes:
            raise ValueError(f"{len(indexes)} indexes and {len(weights)} weights do not match")
        self.indexes = tuple(indexes)
        self.mix = Mix(weights)
        # Equal sources must not run in step, or a batch would hold each sample twice.
        self.orders = tuple(
            Order(index.counts, seed=seed + source, chunk=chunk, lanes=lanes, window=window)
            for source, index in enumerate(indexes)
        )
        sizes = [order.num_samples for order in self.orders]
        self.offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        self.num_samples = int(self.offsets[-1])
        self.fingerprint = _fingerprint(indexes, weights)

    @property
    def epoch_samples(self) -> int:
        """Samples of "one epoch" of a run: those of all sources, whatever their weights."""
        return self.num_samples

    def check_batch_size(self, global_batch_size: int) -> None:
        """DataError where a global batch would need a sample twice."""
        for source, order in enumerate(self.orders):
            quota, of = global_batch_size, "the data set"
            if len(self.orders) > 1:
                quota = self.mix.largest_quota(source, global_batch_size)
                of = f"source {source + 1} ({self.indexes[source].shards[0].url})"
            check_batch_size(quota, order.num_samples, of)

    def rows(
        self,
        positions: Int64s,  # (n,) in any order
        global_batch_size: int,
    ) -> Rows:
        """Samples at these positions, when step s consumes `global_batch_size` from s times it."""
        sources, places = self.mix.split(positions)
        epochs, ids = np.empty_like(positions), np.empty_like(positions)
        for source, order in enumerate(self.orders):
            mine = sources == source
            if mine.any():
                batch_of = self._batch_of(source, global_batch_size)
                epochs[mine], local = order.ids(places[mine], batch_of)
                ids[mine] = local + self.offsets[source]
        return Rows(positions, sources, epochs, ids)

    def batch(self, step: int, global_batch_size: int) -> Rows:
        """Global batch `step`, 0-based: no sample twice."""
        self.check_batch_size(global_batch_size)
        start = step * global_batch_size
        return self.rows(np.arange(start, start + global_batch_size), global_batch_size)

    def entries(self, ids: Int64s) -> list[Entry]:  # (n,) ids over all sources
        """Index entries of samples, in the order asked for; `Entry.id` stays that of its source."""
        sources = np.searchsorted(self.offsets, ids, side="right") - 1
        found: dict[int, Entry] = {}
        for source in np.unique(sources):
            mine = ids[sources == source]
            entries = self.indexes[source].entries(mine - self.offsets[source])
            found.update(zip(mine.tolist(), entries, strict=True))
        return [found[sample] for sample in ids.tolist()]

    def keys(self, ids: Int64s) -> list[str]:
        """ "<shard name>:<key>" of samples, for people."""
        return [sample_name(entry) for entry in self.entries(ids)]

    def _batch_of(self, source: int, global_batch_size: int) -> BatchOf:
        if len(self.orders) == 1:
            return equal_batches(global_batch_size)
        return self.mix.batch_of(source, global_batch_size)


def sample_name(entry: Entry) -> str:
    """ "<shard name>:<key>" """
    return f"{entry.shard.rpartition('/')[2]}:{entry.key}"


def _fingerprint(indexes: Sequence[Index], weights: Sequence[float]) -> str:
    shares = [weight / sum(weights) for weight in weights]
    text = repr((ORDER_VERSION, shares, [index.fingerprint for index in indexes]))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
