"""Position -> sample: pure arithmetic that needs the shards' sample counts and a seed.

A position counts the samples consumed by the whole job since step 0, so order, resume and a change
of world size all come down to integers. Within an epoch the samples, as a ring, are cut into chunks
of consecutive samples; a keyed permutation of the chunks gives the epoch's sequence, which is cut
into lanes, each lane into windows, each window is permuted. Positions take the lanes in turn.
Seeking costs the same anywhere: nothing is stored and nothing is replayed.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import lgamma

import numpy as np
from numpy.typing import NDArray

from data.errors import DataError

ORDER_VERSION = 1
"""Part of the data's identity: another version means another order for the same seed."""

Int64s = NDArray[np.int64]
Words = NDArray[np.uint64]
BatchOf = Callable[[int], tuple[int, int]]
"""position -> [start, stop) of the global batch that holds it."""

_ROUNDS = 8  # of the Feistel network; two bring every output within reach of every input
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_CHUNKS, _PHASE, _WINDOW = 1, 2, 3  # what a key is for


def mix_bits(words: Words) -> Words:
    """64-bit finaliser of SplitMix64 (Steele, Lea, Flood 2014): every bit moves every bit."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def derive_key(*fields: int | Int64s) -> Words:
    """One 64-bit key from integers or arrays of them, in this order."""
    key = np.zeros(1, np.uint64)
    for field in fields:
        words = np.atleast_1d(np.asarray(field, np.int64)).view(np.uint64)
        key = mix_bits((key + _GOLDEN) ^ mix_bits(words + _GOLDEN))
    return key


def permute(
    values: Int64s,  # (n,) each in [0, sizes)
    sizes: Int64s,  # (n,) or (1,) size of the permutation that each value is looked up in
    keys: Words,  # (n,) or (1,)
) -> Int64s:  # (n,) each in [0, sizes)
    """Keyed bijection of [0, size): a Feistel network on a rectangle, walked until inside the size.

    Black and Rogaway 2002, "Ciphers with arbitrary finite domains", sections 4 and 5.
    """
    return _walk(_feistel, values, sizes, keys)


def unpermute(
    values: Int64s,  # (n,) each in [0, sizes)
    sizes: Int64s,  # (n,) or (1,)
    keys: Words,  # (n,) or (1,)
) -> Int64s:  # (n,) each in [0, sizes)
    """The inverse of `permute`."""
    return _walk(_unfeistel, values, sizes, keys)


def _walk(
    network: Callable[[Words, Words, Words, Words], Words],
    values: Int64s,
    sizes: Int64s,
    keys: Words,
) -> Int64s:
    limits = np.broadcast_to(sizes.astype(np.uint64), values.shape)
    keys = np.broadcast_to(keys, values.shape)
    num_rows = np.ceil(np.sqrt(limits)).astype(np.uint64)
    num_columns = (limits + num_rows - np.uint64(1)) // num_rows
    result = network(values.astype(np.uint64), num_rows, num_columns, keys)
    outside = np.flatnonzero(result >= limits)
    while len(outside):
        walked = network(result[outside], num_rows[outside], num_columns[outside], keys[outside])
        result[outside] = walked
        outside = outside[walked >= limits[outside]]
    return result.astype(np.int64)


def _feistel(values: Words, num_rows: Words, num_columns: Words, keys: Words) -> Words:
    row, column = np.divmod(values, num_columns)
    for number in range(0, _ROUNDS, 2):
        row = (row + _noise(column, keys, number)) % num_rows
        column = (column + _noise(row, keys, number + 1)) % num_columns
    return row * num_columns + column


def _unfeistel(values: Words, num_rows: Words, num_columns: Words, keys: Words) -> Words:
    row, column = np.divmod(values, num_columns)
    for number in reversed(range(0, _ROUNDS, 2)):
        column = (column + num_columns - _noise(row, keys, number + 1) % num_columns) % num_columns
        row = (row + num_rows - _noise(column, keys, number) % num_rows) % num_rows
    return row * num_columns + column


def _noise(words: Words, keys: Words, number: int) -> Words:
    """32 bits, so that a sum with a row or column does not wrap."""
    return mix_bits(words * _GOLDEN + (keys + np.uint64(number))) >> np.uint64(32)


class Order:
    """The order of one source: each sample once an epoch, epochs following without a gap.

    `lanes * window * chunk` samples are mixed at any time; a set of no more than these is permuted
    as a whole.
    """

    def __init__(
        self,
        counts: Sequence[int] | Int64s,  # (shards,) samples of each shard
        *,
        seed: int,
        chunk: int = 64,
        lanes: int = 64,
        window: int = 64,
    ) -> None:
        self.counts = np.asarray(counts, dtype=np.int64)
        self.num_samples = int(self.counts.sum())
        if self.num_samples < 1:
            raise DataError("the data set is empty: no shard has a usable sample")
        self.seed = seed
        self.chunk = min(chunk, self.num_samples)
        self.resident_samples = min(lanes * window * chunk, self.num_samples)
        self.lanes = lanes if self.resident_samples < self.num_samples else 1
        self._repairs: dict[tuple[int, ...], tuple[Int64s, Int64s]] = {}

    def ids(
        self,
        positions: Int64s,  # (n,) in any order
        batch_of: BatchOf | None = None,
    ) -> tuple[Int64s, Int64s]:  # (n,) epochs, (n,) ids
        """Epoch and sample of each position.

        With `batch_of`, a global batch that lies across the end of an epoch does not hold a sample
        twice: odd epochs exchange a few samples so that their ends differ from their neighbours'.
        That is always possible when an epoch has three batches, and mostly when it has two.
        """
        epochs, places = np.divmod(positions, self.num_samples)
        ids = self._plain_ids(epochs, places)
        if batch_of is not None:
            for epoch in np.unique(epochs[epochs % 2 == 1]):
                self._exchange_ends(int(epoch), epochs, places, ids, batch_of)
        return epochs, ids

    def batch(
        self, step: int, global_batch_size: int
    ) -> tuple[Int64s, Int64s]:  # (global_batch_size,) epochs, ids
        """Global batch `step`, 0-based."""
        check_batch_size(global_batch_size, self.num_samples)
        start = step * global_batch_size
        positions = np.arange(start, start + global_batch_size, dtype=np.int64)
        return self.ids(positions, equal_batches(global_batch_size))

    def _plain_ids(self, epochs: Int64s, places: Int64s) -> Int64s:
        places = self._mix_lanes(epochs, places)
        whole_chunks = self.num_samples // self.chunk
        slots, offsets = np.divmod(places, self.chunk)
        # What is left over after the last whole chunk keeps the last slot; the phase moves the
        # cuts every epoch, so it is other samples each time.
        whole = slots < whole_chunks
        keys = derive_key(self.seed, _CHUNKS, epochs[whole])
        slots[whole] = permute(slots[whole], np.array([whole_chunks]), keys)
        phases = derive_key(self.seed, _PHASE, epochs) % np.uint64(self.num_samples)
        return (slots * self.chunk + offsets + phases.astype(np.int64)) % self.num_samples

    def _mix_lanes(self, epochs: Int64s, places: Int64s) -> Int64s:
        """Place in the epoch -> place in its sequence of chunks."""
        steps, lanes = np.divmod(places, self.lanes)
        base, longer = divmod(self.num_samples, self.lanes)
        starts = lanes * base + np.minimum(lanes, longer)
        lengths = base + (lanes < longer)
        window_samples = self.resident_samples // self.lanes
        num_windows = np.maximum(1, np.rint(lengths / window_samples).astype(np.int64))
        windows = ((steps + 1) * num_windows - 1) // lengths
        cuts = windows * lengths // num_windows
        sizes = (windows + 1) * lengths // num_windows - cuts
        keys = derive_key(self.seed, _WINDOW, epochs, lanes, windows)
        return starts + cuts + permute(steps - cuts, sizes, keys)

    def _exchange_ends(
        self, epoch: int, epochs: Int64s, places: Int64s, ids: Int64s, batch_of: BatchOf
    ) -> None:
        first = epoch * self.num_samples
        key = (epoch, *batch_of(first), *batch_of(first + self.num_samples))
        if key not in self._repairs:
            if len(self._repairs) >= 4:
                self._repairs.pop(next(iter(self._repairs)))
            self._repairs[key] = self._repair(*key)
        moved, replacements = self._repairs[key]
        if len(moved):
            found = np.searchsorted(moved, places).clip(max=len(moved) - 1)
            hit = (epochs == epoch) & (moved[found] == places)
            ids[hit] = replacements[found[hit]]

    def _repair(
        self, epoch: int, head_start: int, head_stop: int, tail_start: int, tail_stop: int
    ) -> tuple[Int64s, Int64s]:
        """Places of an odd epoch whose samples change, sorted, and their new samples."""
        first, last = epoch * self.num_samples, (epoch + 1) * self.num_samples
        before = self._span(head_start, first)
        after = self._span(last, tail_stop)
        head = head_stop - first if len(before) else 0
        tail = last - tail_start if len(after) else 0
        reach = 2 * (head_stop - head_start + tail_stop - tail_start)
        places = np.arange(self.num_samples)[: head + reach]
        if self.num_samples > head + tail + 2 * reach:
            end = np.arange(self.num_samples - tail - reach, self.num_samples)
            places = np.concatenate([places, end])
        else:
            places = np.arange(self.num_samples)
        old = self._plain_ids(np.full(len(places), epoch), places)
        ids = old.copy()
        in_head, in_tail = places < head, places >= self.num_samples - tail
        middle = ~in_head & ~in_tail
        nothing = np.zeros(0, np.int64)
        _exchange(ids, in_head, before, middle, nothing)
        _exchange(ids, in_tail, after, middle, nothing)
        _exchange(ids, in_head, before, in_tail, after)
        _exchange(ids, in_tail, after, in_head, before)
        changed = ids != old
        return places[changed], ids[changed]

    def _span(self, start: int, stop: int) -> Int64s:
        return self.ids(np.arange(start, stop, dtype=np.int64))[1]


def _exchange(
    ids: Int64s,
    here: NDArray[np.bool_],
    banned_here: Int64s,
    there: NDArray[np.bool_],
    banned_there: Int64s,
) -> None:
    """Swap samples banned `here` for samples from `there`, as far as both places allow."""
    bad_here = np.isin(ids, banned_here)
    leaving = np.flatnonzero(here & bad_here & ~np.isin(ids, banned_there))
    coming = np.flatnonzero(there & ~bad_here)
    num = min(len(leaving), len(coming))
    leaving, coming = leaving[:num], coming[:num]
    ids[leaving], ids[coming] = ids[coming], ids[leaving]


def equal_batches(global_batch_size: int) -> BatchOf:
    """`batch_of` of a run whose every global batch has this many samples of the source."""

    def batch_of(position: int) -> tuple[int, int]:
        start = position // global_batch_size * global_batch_size
        return start, start + global_batch_size

    return batch_of


def check_batch_size(global_batch_size: int, num_samples: int, of: str = "the data set") -> None:
    """A global batch without a repeated sample needs as many samples; DataError otherwise."""
    if not 1 <= global_batch_size <= num_samples:
        raise DataError(
            f"a global batch takes {global_batch_size:,} samples and {of} has {num_samples:,}: "
            "lower train.global_batch_size or add data"
        )


@dataclass(frozen=True)
class Mixing:
    """How well an order mixes the shards, against a full permutation of the samples."""

    num_samples: int
    num_shards: int
    batch_size: int
    resident_samples: int
    """Samples that are mixed with each other at any time."""
    first: int
    """Distinct shards in the run's first batch."""
    mean: float
    """Distinct shards in a batch, mean over batches spread over an epoch."""
    worst: int
    ideal: float
    """Expected under a full permutation."""

    @property
    def ratio(self) -> float:
        """Mean over ideal; 1 is a full permutation."""
        return self.mean / self.ideal


def report(order: Order, batch_size: int, *, num_batches: int = 32) -> Mixing:
    """Distinct shards of `num_batches` batches of the first epoch, the first one included."""
    check_batch_size(batch_size, order.num_samples)
    last_step = max(0, order.num_samples // batch_size - 1)
    steps = np.unique(np.linspace(0, last_step, num_batches).astype(np.int64))
    ends = np.cumsum(order.counts)
    distinct = [
        len(np.unique(np.searchsorted(ends, order.batch(int(step), batch_size)[1], side="right")))
        for step in steps
    ]
    return Mixing(
        num_samples=order.num_samples,
        num_shards=int((order.counts > 0).sum()),
        batch_size=batch_size,
        resident_samples=order.resident_samples,
        first=distinct[0],
        mean=float(np.mean(distinct)),
        worst=min(distinct),
        ideal=ideal_distinct_shards(order.counts, batch_size),
    )


def ideal_distinct_shards(counts: Int64s, batch_size: int) -> float:
    """Expected number of shards in a batch drawn without replacement from all samples.

    A shard of n out of N samples is missed with probability C(N - n, B) / C(N, B).
    """
    total = int(counts.sum())

    def log_choose(n: int) -> float:
        return lgamma(n + 1) - lgamma(n - batch_size + 1)

    sizes, repeats = np.unique(counts[counts > 0], return_counts=True)
    missed = [
        np.exp(log_choose(total - int(n)) - log_choose(total)) if total - n >= batch_size else 0.0
        for n in sizes
    ]
    return float((repeats * (1.0 - np.array(missed))).sum())
