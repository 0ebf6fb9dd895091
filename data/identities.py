"""Images by identity: which samples of an index have each label, in 4 bytes a sample.

Everything here streams over the index's label column, shard by shard; no image is read.
"""

import hashlib
from collections.abc import Iterable, Iterator
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from data.errors import DataError
from data.index import Index

Int64s = NDArray[np.int64]
Samples = NDArray[np.uint32] | NDArray[np.uint64]

_SPARSE = 16
"""Labels that need so many times more classes than there are samples are other people's ids."""


class LabelColumn(Protocol):
    """What an `Index` offers of its labels."""

    def __len__(self) -> int: ...

    def iter_column(self, name: str) -> Iterator[Int64s]:
        """Shard by shard."""
        ...


class Identities(NamedTuple):
    """Samples sorted by label, within a label by id."""

    samples: Samples  # (n,) ids, uint32 below 2^32 samples
    starts: Int64s  # (C + 1,) label c has the samples `starts[c]:starts[c + 1]`

    @property
    def counts(self) -> Int64s:  # (C,)
        """Images of each identity."""
        return np.diff(self.starts)

    def digest(self) -> str:
        """Identity of the grouping: an index's fingerprint does not know labels."""
        state = hashlib.blake2b(self.starts.astype("<i8").tobytes(), digest_size=16)
        state.update(self.samples.data)
        return state.hexdigest()


def largest_label(index: Index) -> tuple[int, int]:
    """The largest label and a sample that has it; DataError naming a sample that has none."""
    largest, holder = -1, 0
    for first, labels in _from_ids(index.iter_column("label")):
        if not len(labels):
            continue
        if labels.min() < 0:
            raise _no_label(index, first + int(labels.argmin()))
        at = int(labels.argmax())
        if labels[at] > largest:
            largest, holder = int(labels[at]), first + at
    return largest, holder


def check_dense(largest: int, num_samples: int, name: str) -> None:
    """DataError where labels up to this one, held by the sample `name`, do not count classes."""
    if largest >= _SPARSE * num_samples:
        raise DataError(
            f"{name} has the label {largest}, and there are only {num_samples:,} samples: labels "
            "are class numbers from 0 on; renumber them (nsphere pack does), or set "
            f"centers.num_classes to {largest + 1} if it is meant"
        )


def count_identities(columns: Iterable[Int64s], num_classes: int) -> Int64s:  # (num_classes,)
    """Images of each identity; labels all lie in [0, num_classes)."""
    counts = np.zeros(num_classes, np.int64)
    for labels in columns:
        present, images = np.unique(labels, return_counts=True)
        counts[present] += images
    return counts


def group_by_identity(column: LabelColumn, num_classes: int) -> Identities:
    """Samples by label, labels lying in [0, num_classes): two passes over the column.

    Takes 4 bytes a sample (8 from 2^32 samples on) and 16 a class, and the largest shard's labels.
    """
    starts = np.zeros(num_classes + 1, np.int64)
    np.cumsum(count_identities(column.iter_column("label"), num_classes), out=starts[1:])
    samples: Samples = np.empty(len(column), np.uint32)
    if len(column) >= 1 << 32:
        samples = np.empty(len(column), np.uint64)
    free = starts[:-1].copy()
    for first, labels in _from_ids(column.iter_column("label")):
        order = np.argsort(labels, kind="stable")
        present, heads, images = np.unique(labels[order], return_index=True, return_counts=True)
        places = np.repeat(free[present] - heads, images) + np.arange(len(labels))
        samples[places] = first + order
        free[present] += images
    return Identities(samples, starts)


def _from_ids(pieces: Iterable[Int64s]) -> Iterator[tuple[int, Int64s]]:
    """Each piece with the id of its first sample."""
    first = 0
    for piece in pieces:
        yield first, piece
        first += len(piece)


def _no_label(index: Index, sample: int) -> DataError:
    why = index.why_unlabelled(sample, "integer label")
    return DataError(
        f"{why}; classes need one for each image: repair or leave out the sample, or "
        "set data.label_key to the ending of the label member"
    )
