"""Position -> sample where a global batch is P identities with K images each.

An epoch gives each identity its images in an order of their own, cut into groups of K. The groups
of all identities, one identity after the other in an order keyed by the epoch, make one list,
which is cut into P lanes of S groups. Batch s of the epoch's S takes one group of each lane, by a
keyed permutation of the lane. So the groups of an identity, neighbours in a lane, go to distinct
batches spread over the epoch; the few identities that two lanes share are kept apart by exchanges.

Rules for identities whose images are no multiple of K, by `remainder`:
- "drop": what is left of an identity after its last group rests for this epoch, and it is other
  images in the next. An identity with fewer than K images never comes.
- "share": all that is left, all images of small identities included, is laid end to end and cut
  into groups of K that hold several identities. Each image comes once an epoch.
In both no image comes twice in an epoch, an epoch is whole batches (less than one batch of groups
rests), and an identity with more groups than there are batches rests with the others.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data.config import Remainder
from data.errors import DataError
from data.identities import Identities
from data.order import Words, derive_key, mix_bits, permute, unpermute

Int64s = NDArray[np.int64]

_IDENTITIES, _LANE, _IMAGES = 5, 6, 7  # what a key is for; 1 to 4 are taken by order and batch
_CANDIDATES = 64


class Shape(NamedTuple):
    """What follows from the number of groups in a batch."""

    num_lanes: int
    """P, groups of a batch."""
    num_batches: int
    """S, batches of an epoch."""
    num_shared: int
    """Groups made of several identities' remainders; they come first in the list."""


class IdentityOrder:
    """The order of one source in batches of P x K; seeking costs the same anywhere.

    Memory: the grouping's (4 bytes a sample, 8 a class), and at most 24 bytes a class for each of
    the two epochs used last.
    """

    def __init__(
        self,
        identities: Identities,
        *,
        seed: int,
        images_per_identity: int,
        remainder: Remainder = "drop",
    ) -> None:
        self.identities = identities
        self.seed = seed
        self.images_per_identity = images_per_identity
        self.remainder = remainder
        self.num_samples = len(identities.samples)
        counts = identities.counts
        self._histogram = np.bincount(counts // images_per_identity)
        rest = int((counts % images_per_identity).sum()) if remainder == "share" else 0
        self._num_shared = rest // images_per_identity
        self._shapes: dict[int, Shape] = {}
        self._epochs: dict[tuple[int, int], _Epoch] = {}

    def shape(self, groups: int) -> Shape:
        """Lanes and batches where a batch takes `groups` groups.

        Raises DataError where there are not so many identities.
        """
        if groups not in self._shapes:
            self._shapes[groups] = Shape(groups, self._num_batches(groups), self._num_shared)
        return self._shapes[groups]

    def small_identities(self) -> tuple[int, int]:
        """Identities with fewer than K images, and their images."""
        counts = self.identities.counts
        small = counts[(counts > 0) & (counts < self.images_per_identity)]
        return len(small), int(small.sum())

    def ids(
        self,
        steps: Int64s,  # (n,) global batches, in any order
        lanes: Int64s,  # (n,) number of the group among the batch's of this source
        images: Int64s,  # (n,) number of the image in its group
        groups: int,  # most groups that any batch takes of this source
    ) -> tuple[Int64s, Int64s]:  # (n,) epochs, (n,) ids
        """Epoch and sample of each place."""
        shape = self.shape(groups)
        epochs, batches = np.divmod(steps, shape.num_batches)
        ids = np.empty_like(steps)
        for epoch in np.unique(epochs).tolist():
            mine = epochs == epoch
            ids[mine] = self._epoch(epoch, shape).ids(batches[mine], lanes[mine], images[mine])
        return epochs, ids

    def image_of(self, identity: int, key: np.uint64) -> int:
        """A sample of the identity, drawn by a key."""
        first, last = self.identities.starts[identity : identity + 2].tolist()
        return int(self.identities.samples[first + int(key % np.uint64(last - first))])

    def _epoch(self, epoch: int, shape: Shape) -> "_Epoch":
        key = (epoch, shape.num_lanes)
        if key not in self._epochs:
            if len(self._epochs) >= 2:
                self._epochs.pop(next(iter(self._epochs)))
            self._epochs[key] = _Epoch(self, epoch, shape)
        return self._epochs[key]

    def _num_batches(self, groups: int) -> int:
        """The most batches that all find `groups` groups, none of the same identity twice."""
        sizes = np.arange(len(self._histogram))
        most = (self._num_shared + int(self._histogram @ sizes)) // groups

        def enough(num: int) -> bool:
            listed = self._num_shared + int(self._histogram @ np.minimum(sizes, num))
            return listed >= groups * num

        low, high = 0, most  # enough(low) holds, enough(high + 1) does not
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if enough(middle) else (low, middle - 1)
        if not low:
            each = self.images_per_identity
            have = int(self._histogram[1:].sum())
            share = "" if self.remainder == "share" else ', or set data.remainder = "share"'
            raise DataError(
                f"a global batch takes {groups:,} identities with {each} images each, and "
                f"{have:,} have so many: lower train.global_batch_size or "
                f"data.images_per_identity{share}"
            )
        return low


class _Epoch:
    """The list of one epoch: which identity's groups lie where."""

    def __init__(self, order: IdentityOrder, epoch: int, shape: Shape) -> None:
        self._samples, self._starts = order.identities
        self._each, self._seed, self._number = order.images_per_identity, order.seed, epoch
        self._shape = shape
        counts = order.identities.counts
        # One identity, one word: the mixer is a bijection, so that no two are equal.
        words = np.arange(len(counts), dtype=np.uint64) + derive_key(order.seed, _IDENTITIES, epoch)
        self._order = np.argsort(mix_bits(words)).astype(np.uint32)
        in_order = counts[self._order]
        groups = np.minimum(in_order // self._each, shape.num_batches)
        self._ends = np.cumsum(groups)  # in the list of groups, after the shared ones
        self._rest_ends = (
            np.cumsum(in_order % self._each) if shape.num_shared else np.zeros(0, np.int64)
        )
        self._moved: dict[tuple[int, int], int] = {}  # (lane, batch) -> group in the lane
        self._keep_apart()

    def ids(self, batches: Int64s, lanes: Int64s, images: Int64s) -> Int64s:
        """Sample at each place of the epoch."""
        size = self._shape.num_batches
        places = permute(batches, np.array([size]), self._lane_keys(lanes))
        if self._moved:
            wanted = zip(lanes.tolist(), batches.tolist(), strict=True)
            moved = [self._moved.get(place, -1) for place in wanted]
            places = np.where(np.array(moved) >= 0, moved, places)
        listed = lanes * size + places - self._shape.num_shared
        slots, numbers = np.empty_like(listed), np.empty_like(listed)
        own = listed >= 0
        slots[own], first = self._find(self._ends, listed[own])
        numbers[own] = (listed[own] - first) * self._each + images[own]
        rest = (listed[~own] + self._shape.num_shared) * self._each + images[~own]
        slots[~own], first = self._find(self._rest_ends, rest)
        identities = self._order[slots].astype(np.int64)
        counts = self._starts[identities + 1] - self._starts[identities]
        whole = counts[~own] // self._each * self._each  # the remainder follows the groups
        numbers[~own] = whole + rest - first
        keys = derive_key(self._seed, _IMAGES, self._number, identities)
        return self._samples[self._starts[identities] + permute(numbers, counts, keys)].astype(
            np.int64
        )

    @staticmethod
    def _find(ends: Int64s, wanted: Int64s) -> tuple[Int64s, Int64s]:
        """Which run of a list each place lies in, and where that run starts."""
        slots = np.searchsorted(ends, wanted, side="right")
        return slots, np.where(slots > 0, ends[slots - 1], 0) if len(ends) else slots

    def _lane_keys(self, lanes: Int64s) -> Words:
        return derive_key(self._seed, _LANE, self._number, lanes)

    def _keep_apart(self) -> None:
        """Exchanges in the second lane of each identity that lies in two, so that its groups in
        both go to distinct batches; there is always a free batch, since it has at most S groups.
        """
        size, shared = self._shape.num_batches, self._shape.num_shared
        lanes = np.arange(1, self._shape.num_lanes)
        edges = lanes * size - shared
        slots, starts = self._find(self._ends, np.maximum(edges, 0))
        cut = (edges > 0) & (starts < edges)
        lanes, edges, slots, starts = lanes[cut], edges[cut], slots[cut], starts[cut]
        before, after = edges - starts, self._ends[slots] - edges
        nothing = np.zeros(0, np.int64)
        pieces = [
            (np.full(a + b, lane) - (np.arange(a + b) < a), (np.arange(a + b) - a) % size)
            for lane, a, b in zip(lanes.tolist(), before.tolist(), after.tolist(), strict=True)
        ]
        own_lanes = np.concatenate([nothing, *(piece[0] for piece in pieces)])
        places = np.concatenate([nothing, *(piece[1] for piece in pieces)])
        batches = unpermute(places, np.array([size]), self._lane_keys(own_lanes)).tolist()
        exchanged: dict[tuple[int, int], int] = {}  # (lane, place) -> batch
        at = 0
        for lane, a, b in zip(lanes.tolist(), before.tolist(), after.tolist(), strict=True):
            taken = {
                exchanged.get((lane - 1, size - a + number), batches[at + number])
                for number in range(a)
            }
            for number in range(b):
                if batches[at + a + number] in taken:
                    self._exchange(lane, number, batches[at + a + number], taken, b, exchanged)
            at += a + b

    def _exchange(
        self,
        lane: int,
        place: int,
        batch: int,
        taken: set[int],
        first: int,
        exchanged: dict[tuple[int, int], int],
    ) -> None:
        """Give `place` of the lane a batch that is not taken, from a place at `first` or later."""
        size = self._shape.num_batches
        for start in range(first, size, _CANDIDATES):
            others = np.arange(start, min(start + _CANDIDATES, size))
            found = unpermute(others, np.array([size]), self._lane_keys(np.array([lane])))
            for other, free in zip(others.tolist(), found.tolist(), strict=True):
                if (lane, other) not in exchanged and free not in taken:
                    exchanged[lane, other], exchanged[lane, place] = batch, free
                    self._moved[lane, batch], self._moved[lane, free] = other, place
                    return
        raise AssertionError("an identity has more groups than an epoch has batches")
