"""Positions -> batches over worker processes; how many there are never changes what comes out.

A rank's rows of a global batch are cut into pieces, each the work of one worker, so that the memory
read ahead is bounded whatever the batch. The state of a run is one number, the step.
"""

import logging
import multiprocessing
import os
import signal
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import islice
from math import ceil
from multiprocessing.util import Finalize
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from data.augment import ImageTransform
from data.batch import Batch, EvalBatch, EvalRows, SampleReader, TrainRows, join_batches
from data.config import DataConfig
from data.dataset import Int64s, Piece, SampleSet
from data.errors import DataError
from data.index import Index
from data.order import equal_batches
from data.planned_order import PlannedOrder
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
        self._pool = _Pool(rows.load, config, pin=device_type == "cuda")
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
    pool = _Pool(EvalRows(index, reader).load, config, pin=False)
    ledger = _Ledger(config.max_bad_fraction)
    try:
        for batch in pool.run(np.array_split(own, num_batches)):
            ledger.add(batch)
            yield batch
    finally:
        pool.close()


class _Pool:
    """Pieces of work through a torch DataLoader: in order, read ahead, errors as raised."""

    def __init__(self, load: Callable[[Any], Any], config: DataConfig, *, pin: bool) -> None:
        self._work = _Work()
        self._ending = torch.zeros(1, dtype=torch.bool).share_memory_()
        workers = config.workers
        # Forked workers start in 0.1 s and share the index's memory; they never touch a device,
        # and torch gives them one thread, so no thread pool of the parent's is missed.
        self._new_loader = partial(
            DataLoader,
            _Loading(load),
            batch_size=None,
            sampler=self._work,
            collate_fn=_as_it_is,
            pin_memory=pin,
            num_workers=workers,
            prefetch_factor=config.prefetch if workers else None,
            persistent_workers=workers > 0,
            multiprocessing_context=multiprocessing.get_context("fork") if workers else None,
            worker_init_fn=partial(_start_worker, self._ending),
        )
        self._loader: DataLoader[Any] | None = None
        Finalize(self, _set, args=(self._ending,), exitpriority=100)

    def run(self, work: Iterable[Any]) -> Iterator[Any]:
        """The loaded item of each piece of work."""
        self._work.pieces = iter(work)
        try:
            for loaded in self._start():
                if isinstance(loaded, DataError):
                    raise loaded
                yield loaded
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise DataError(
                "a data worker died (killed, often for lack of memory or of /dev/shm): lower "
                "data.workers or data.prefetch; training goes on from its last checkpoint"
            ) from error

    def close(self) -> None:
        """End the workers."""
        _set(self._ending)
        self._loader = None

    def _start(self) -> Iterator[Any]:
        with warnings.catch_warnings():  # more workers than cores is the user's choice
            warnings.filterwarnings("ignore", "This DataLoader will create")
            if self._loader is None:
                self._ending.fill_(False)
                self._loader = self._new_loader()
            return iter(self._loader)


class _Work:
    """Hands the DataLoader whatever pieces of work were set last."""

    pieces: Iterator[Any] = iter(())

    def __iter__(self) -> Iterator[Any]:
        return self.pieces


class _Loading(Dataset[Any]):
    """A user's error travels as a value: torch would wrap it in the worker's traceback."""

    def __init__(self, load: Callable[[Any], Any]) -> None:
        self._load = load

    def __getitem__(self, piece: Any) -> Any:
        try:
            return self._load(piece)
        except DataError as error:
            return error


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


def _start_worker(ending: Tensor, _worker: int) -> None:
    # Ctrl-C, and a scheduler that signals every process of a job, are for the training process:
    # it saves and stops, and needs its workers until then. SIGTERM counts once it is leaving.
    for name in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(name, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0) if ending.item() else None)


def _set(flag: Tensor) -> None:
    flag.fill_(True)


def _as_it_is(loaded: Any) -> Any:
    return loaded
