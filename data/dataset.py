"""A training set: indexes, an order for each, and their mix, as one function position -> sample.

With identity batches, groups of images of one identity are mixed instead of single images; with
planned batches stored plans say which sample comes when. The rest of the loader does not know.
"""

import hashlib
import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data.config import DataConfig, Remainder
from data.errors import DataError
from data.identities import check_dense, group_by_identity, largest_label
from data.identity_order import IdentityOrder
from data.index import Entry, Index
from data.mix import Mix
from data.order import ORDER_VERSION, BatchOf, Order, check_batch_size, equal_batches
from data.planned_order import PlannedOrder, Segment

LOG = logging.getLogger("nsphere.data")
Int64s = NDArray[np.int64]


class Rows(NamedTuple):
    """What stands at some positions of the run's stream of samples."""

    positions: Int64s  # (n,) samples that the whole job consumed before this one
    sources: Int64s  # (n,)
    epochs: Int64s  # (n,) epoch of the source
    ids: Int64s  # (n,) sample id over all sources
    segments: tuple[Segment, ...] = ()
    """Planned batches: what was looked among."""


class Piece(NamedTuple):
    """Some positions of one global batch, and what another process needs to know of the order."""

    positions: Int64s  # (n,)
    segments: tuple[Segment, ...] = ()
    """Planned batches: those that hold the whole global batch."""
    ahead: Int64s | None = None
    """(m,) samples that will be read soon, said once."""


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
        images_per_identity: int = 0,
        remainder: Remainder = "drop",
        planned: bool = False,
    ) -> None:
        """`images_per_identity` K makes each global batch of B samples B/K identities' groups of K
        (`data/identity_order.py`); 0 orders samples without regard to labels. `planned`: by the
        segments of `self.planned` (`data/planned_order.py`), which starts as the plain order.
        """
        if len(indexes) != len(weights) or not indexes:
            raise ValueError(f"{len(indexes)} indexes and {len(weights)} weights do not match")
        if planned and len(indexes) > 1:
            raise DataError(
                f'data.batching = "planned" takes one source, not {len(indexes)}: name all shards '
                "in data.shards, or take plain batches"
            )
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
        self._quotas: dict[tuple[int, int], int] = {}
        self.images_per_identity = images_per_identity
        self.identity_orders: tuple[IdentityOrder, ...] = ()
        """One a source, none with plain batches."""
        self.planned = PlannedOrder(self.orders[0], self.fingerprint) if planned else None
        if images_per_identity:
            self._order_identities(seed, remainder)

    @property
    def epoch_samples(self) -> int:
        """Samples of "one epoch" of a run: those of all sources, whatever their weights."""
        return self.num_samples

    def check_batch_size(self, global_batch_size: int) -> None:
        """DataError where a global batch would need a sample, or an identity, twice."""
        if self.identity_orders:
            groups = self._groups(global_batch_size)
            for source, identities in enumerate(self.identity_orders):
                try:
                    identities.shape(self._quota(source, groups))
                except DataError as error:
                    raise DataError(f"{self._place(source)}: {error}") from None
            return
        for source, order in enumerate(self.orders):
            quota = self._quota(source, global_batch_size)
            check_batch_size(quota, order.num_samples, self._place(source))

    def rows(
        self,
        positions: Int64s,  # (n,) in any order
        global_batch_size: int,
        segments: tuple[Segment, ...] = (),
    ) -> Rows:
        """Samples at these positions, when step s consumes `global_batch_size` from s times it.

        Of planned batches by these `segments`, which hold all positions; none: by those known here.
        """
        if self.identity_orders:
            return self._identity_rows(positions, global_batch_size)
        if self.planned is not None:
            batch_of = equal_batches(global_batch_size)
            epochs, ids = self.planned.ids(positions, batch_of, segments)
            return Rows(positions, np.zeros_like(positions), epochs, ids, segments)
        sources, places = self.mix.split(positions)
        epochs, ids = np.empty_like(positions), np.empty_like(positions)
        for source, order in enumerate(self.orders):
            mine = sources == source
            if mine.any():
                batch_of = self._batch_of(source, global_batch_size)
                epochs[mine], local = order.ids(places[mine], batch_of)
                ids[mine] = local + self.offsets[source]
        return Rows(positions, sources, epochs, ids)

    def batch(self, step: int, global_batch_size: int, segments: tuple[Segment, ...] = ()) -> Rows:
        """Global batch `step`, 0-based: no sample twice. `segments` as `rows` takes them."""
        self.check_batch_size(global_batch_size)
        start = step * global_batch_size
        positions = np.arange(start, start + global_batch_size)
        return self.rows(positions, global_batch_size, segments)

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
        return [entry.name for entry in self.entries(ids)]

    def describe_identities(self, global_batch_size: int) -> list[str]:
        """For people: a line a source, what its identity batches take of it in an epoch."""
        groups = self._groups(global_batch_size)
        self.check_batch_size(global_batch_size)
        lines = []
        for source, order in enumerate(self.identity_orders):
            shape = order.shape(self._quota(source, groups))
            used = shape.num_lanes * shape.num_batches * self.images_per_identity
            small, images = order.small_identities()
            fate = "left out" if order.remainder == "drop" else "sharing groups"
            lines.append(
                f"source {source + 1}: {order.num_samples:,} images of "
                f"{np.count_nonzero(order.identities.counts):,} identities; a batch takes "
                f"{shape.num_lanes:,} x {self.images_per_identity}, an epoch {shape.num_batches:,} "
                f"batches, {used / order.num_samples:.1%} of the images; {small:,} identities "
                f"({images:,} images) have fewer than {self.images_per_identity}: {fate}"
            )
        return lines

    def substitute(self, source: int, key: np.uint64, label: int = -1) -> int:
        """A sample of the source drawn by a key; where batches are by identity, one with `label`
        unless that is -1.
        """
        first = int(self.offsets[source])
        if self.identity_orders and label >= 0:
            return first + self.identity_orders[source].image_of(label, key)
        return first + int(key % np.uint64(self.orders[source].num_samples))

    def _identity_rows(self, positions: Int64s, global_batch_size: int) -> Rows:
        """As `rows`; a position is one image of a group, and groups are what is mixed."""
        groups_in_batch = self._groups(global_batch_size)
        groups, images = np.divmod(positions, self.images_per_identity)
        steps = groups // groups_in_batch
        sources, places = self.mix.split(groups)
        epochs, ids = np.empty_like(positions), np.empty_like(positions)
        for source, order in enumerate(self.identity_orders):
            mine = sources == source
            if mine.any():
                lanes = places - self.mix.taken_before(source, steps * groups_in_batch)
                quota = self._quota(source, groups_in_batch)
                epochs[mine], local = order.ids(steps[mine], lanes[mine], images[mine], quota)
                ids[mine] = local + self.offsets[source]
        return Rows(positions, sources, epochs, ids)

    def _order_identities(self, seed: int, remainder: Remainder) -> None:
        orders = []
        for source, index in enumerate(self.indexes):
            largest, holder = largest_label(index)
            check_dense(largest, len(index), index.entries([holder])[0].name)
            order = IdentityOrder(
                group_by_identity(index, largest + 1),
                seed=seed + source,
                images_per_identity=self.images_per_identity,
                remainder=remainder,
            )
            small, images = order.small_identities()
            if small and remainder == "drop":
                LOG.warning(
                    "%s ...: %d identities (%d images) have fewer than data.images_per_identity = "
                    '%d images and are left out; data.remainder = "share" takes them',
                    index.shards[0].url, small, images, self.images_per_identity,
                )  # fmt: skip
            orders.append(order)
        self.identity_orders = tuple(orders)
        digests = [order.identities.digest() for order in orders]
        self.fingerprint = _digest((self.fingerprint, self.images_per_identity, remainder, digests))

    def _groups(self, global_batch_size: int) -> int:
        groups, rest = divmod(global_batch_size, self.images_per_identity)
        if rest or not groups:
            raise DataError(
                f"train.global_batch_size = {global_batch_size} is no multiple of "
                f"data.images_per_identity = {self.images_per_identity}"
            )
        return groups

    def _quota(self, source: int, of: int) -> int:
        """The most samples or groups of a source in any global batch of so many."""
        if len(self.orders) == 1:
            return of
        if (source, of) not in self._quotas:
            self._quotas[source, of] = self.mix.largest_quota(source, of)
        return self._quotas[source, of]

    def _place(self, source: int) -> str:
        if len(self.orders) == 1:
            return "the data set"
        return f"source {source + 1} ({self.indexes[source].shards[0].url})"

    def _batch_of(self, source: int, global_batch_size: int) -> BatchOf:
        if len(self.orders) == 1:
            return equal_batches(global_batch_size)
        return self.mix.batch_of(source, global_batch_size)


def build_sample_set(indexes: Sequence[Index], config: DataConfig, *, seed: int) -> SampleSet:
    """The training set of a `[data]` section, whose sources the indexes are."""
    by_identity = config.batching == "identities"
    return SampleSet(
        indexes,
        weights=[source.weight for source in config.all_sources()],
        seed=seed,
        chunk=config.chunk,
        lanes=config.lanes,
        window=config.window,
        images_per_identity=config.images_per_identity if by_identity else 0,
        remainder=config.remainder,
        planned=config.batching == "planned",
    )


def _fingerprint(indexes: Sequence[Index], weights: Sequence[float]) -> str:
    shares = [weight / sum(weights) for weight in weights]
    return _digest((ORDER_VERSION, shares, [index.fingerprint for index in indexes]))


def _digest(facts: tuple[Any, ...]) -> str:
    return hashlib.blake2b(repr(facts).encode(), digest_size=16).hexdigest()
