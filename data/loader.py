"""Positions -> batches over worker processes; how many there are never changes what comes out.

A rank's rows of a global batch are cut into pieces, each the work of one worker, so that the memory
read ahead is bounded whatever the batch. The state of a run is one number, the step.
"""

import logging
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from math import ceil

import numpy as np

from data.augment import ImageTransform
from data.batch import Batch, EvalBatch, EvalRows, SampleReader, TrainRows, join_batches
from data.config import DataConfig
from data.dataset import Int64s, Piece, SampleSet
from data.errors import DataError
from data.index import Index
from data.order import equal_batches
from data.planned_order import PlannedOrder
from data.pool import Pool
from data.text import TokenizerSpec

__all__ = ["Batch", "EvalBatch", "TrainLoader", "iter_eval_batches"]

PIECE_ROWS = 256
"""Most rows that one worker loads at a time."""
MIN_SAMPLES_READ = 1000
"""The share of bad samples is judged as if at least so many had been read."""

_log = logging.getLogger("nsphere.data")


class TrainLoader:
    """A `SampleSet` as batches; rank r of W gets rows r, r + W, ... of each global batch."""

    def __init__(
        self,
        samples: SampleSet,
        config: DataConfig,
        *,
        image_transform: ImageTransform | None,  # None: of texts alone
        tokenizer_spec: TokenizerSpec | None,
        global_batch_size: int,
        seed: int,
        rank: int,
        world_size: int,
        device_type: str = "cpu",
    ) -> None:
        samples.check_batch_size(global_batch_size)
        self.global_batch_size = global_batch_size
        self.rank = rank
        self.world_size = world_size
        reader = SampleReader(config, image_transform, tokenizer_spec, samples.indexes)
        rows = TrainRows(samples, reader, global_batch_size=global_batch_size, seed=seed)
        self._samples = samples
        self._pool = Pool(rows.load, config, pin=device_type == "cuda")
        self._read_ahead = config.read_ahead
        self._ledger = _Ledger(config.max_bad_fraction)

    def batches(self, first_step: int, num_steps: int) -> Iterator[Batch]:
        """Global batches [first_step, first_step + num_steps), 0-based; seeking costs nothing.

        The workers stay for the next call, which ends this one. Of planned batches those are read
        ahead that are decided; at least the next one is when it is asked for. DataError when a
        shard cannot be read, or when more than `max_bad_fraction` of this rank's samples were bad.
        """
        step, last = first_step, first_step + num_steps
        while step < last:
            pieces = self._pool.run(self._pieces(step, last))
            while found := list(islice(pieces, len(self._cut(step)))):  # none: not decided then
                batch = join_batches(found)
                self._ledger.add(batch)
                yield batch
                step += 1

    def close(self) -> None:
        """End the workers; the next `batches` starts them again."""
        self._pool.close()

    def _pieces(self, first: int, last: int) -> Iterator[Piece]:
        """The work of steps [first, last), up to the first that is not decided when it is asked."""
        planned, size = self._samples.planned, self.global_batch_size
        if planned is None:
            yield from (Piece(cut) for step in range(first, last) for cut in self._cut(step))
            return
        for step in range(first, last):
            if step > first and planned.end < (step + 1) * size:
                return
            segments = planned.between(step * size, (step + 1) * size)
            ahead = self._ahead(planned, step, first)
            for cut in self._cut(step):
                yield Piece(cut, segments, ahead)
                ahead = None

    def _ahead(self, planned: PlannedOrder, step: int, first: int) -> Int64s | None:
        """This rank's samples of the window of steps that follows the one which `step` begins."""
        size = self.global_batch_size
        window = max(1, self._read_ahead * self.world_size // size)
        if not self._read_ahead or (step - first) % window:
            return None
        start = (step + (1 if step == first else window)) * size
        stop = min((step + 2 * window) * size, planned.end)
        positions = np.arange(start + self.rank, stop, self.world_size)
        return planned.ids(positions, equal_batches(size), planned.between(start, stop))[1]

    def _cut(self, step: int) -> list[Int64s]:
        """This rank's positions in a global batch, as pieces of nearly equal size."""
        start = step * self.global_batch_size
        positions = np.arange(start + self.rank, start + self.global_batch_size, self.world_size)
        return np.array_split(positions, max(1, ceil(len(positions) / PIECE_ROWS)))


def iter_eval_batches(
    index: Index,
    config: DataConfig,
    *,
    image_transform: ImageTransform | None,  # None: of texts alone
    tokenizer_spec: TokenizerSpec | None,
    batch_size: int,
    rank: int,
    world_size: int,
    ids: Int64s | None = None,  # samples, at least one; None: all of the index
) -> Iterator[EvalBatch]:
    """Every sample exactly once over the ranks, in id order; as many batches on each rank.

    `batch_size` is the most rows of one. They are balanced, so that none is empty unless ranks
    outnumber samples or samples are bad. A rank's batches are a run of consecutive samples.
    """
    total = len(index) if ids is None else len(ids)
    own = np.arange(rank * total // world_size, (rank + 1) * total // world_size)
    own = own if ids is None else ids[own]
    num_batches = ceil(total / (world_size * batch_size))
    reader = SampleReader(config, image_transform, tokenizer_spec, [index])
    pool = Pool(EvalRows(index, reader).load, config, pin=False)
    ledger = _Ledger(config.max_bad_fraction)
    try:
        for batch in pool.run(np.array_split(own, num_batches)):
            ledger.add(batch)
            yield batch
    finally:
        pool.close()


class _Ledger:
    """Bad samples so far: each is logged once, and too many end the run."""

    def __init__(self, max_fraction: float) -> None:
        self._max_fraction = max_fraction
        self._num_read = 0
        self._num_bad = 0
        self._logged: set[tuple[str, str]] = set()
        self._by_shard: Counter[str] = Counter()

    def add(self, batch: Batch | EvalBatch) -> None:
        self._num_read += len(batch.ids) + len(batch.bad) * isinstance(batch, EvalBatch)
        self._num_bad += len(batch.bad)
        for bad in batch.bad:
            self._by_shard[bad.shard] += 1
            if (bad.shard, bad.key) not in self._logged:
                self._logged.add((bad.shard, bad.key))
                _log.warning("bad sample %s in %s: %s", bad.key, bad.shard, bad.reason)
        if self._num_bad > self._max_fraction * max(self._num_read, MIN_SAMPLES_READ):
            worst = ", ".join(f"{name} ({num})" for name, num in self._by_shard.most_common(3))
            raise DataError(
                f"{self._num_bad} of {self._num_read:,} samples read were bad, more than "
                f"data.max_bad_fraction = {self._max_fraction:g} allows; most in {worst}: repair "
                "or leave out these shards, or raise the limit"
            )
