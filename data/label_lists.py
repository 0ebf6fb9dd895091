"""Lists of labels: which labels each text has, as one compressed sparse row (CSR) structure."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from data.errors import DataError
from data.index import Index

Int64s = NDArray[np.int64]
Int32s = NDArray[np.int32]


@dataclass(frozen=True)
class LabelLists:
    """Row i has the labels `ids[offsets[i]:offsets[i + 1]]`, ascending and each once."""

    offsets: Int64s  # (N + 1,)
    ids: Int32s  # (nnz,)

    @property
    def num_rows(self) -> int:
        """N."""
        return len(self.offsets) - 1

    @property
    def counts(self) -> Int64s:  # (N,)
        """Labels of each row."""
        return np.diff(self.offsets)

    @property
    def num_labels(self) -> int:
        """The largest label + 1, 0 where there is none: what a label table must hold at least."""
        return int(self.ids.max()) + 1 if len(self.ids) else 0

    def of(
        self,
        rows: Int64s,  # (n,) in any order, repeats allowed
    ) -> Self:
        """These rows alone. Raises IndexError for a row that does not exist."""
        rows = np.asarray(rows, np.int64)
        starts, counts = self.offsets[:-1][rows], self.counts[rows]
        offsets = _offsets(counts)
        places = np.repeat(starts - offsets[:-1], counts) + np.arange(offsets[-1])
        return type(self)(offsets, self.ids[places])

    def row(self, row: int) -> list[int]:
        """The labels of one row."""
        return self.ids[self.offsets[row] : self.offsets[row + 1]].tolist()

    def transposed(self, num_labels: int) -> Self:
        """Rows of each label, ascending: N and L change places. Takes 12 bytes a positive."""
        counts = np.bincount(self.ids, minlength=num_labels).astype(np.int64)
        order = np.argsort(self.ids, kind="stable")
        owners = np.repeat(np.arange(self.num_rows, dtype=np.int32), self.counts)
        return type(self)(_offsets(counts), owners[order])

    @classmethod
    def of_rows(cls, rows: Iterable[Sequence[int]]) -> Self:
        """From one sequence of labels a row, in any order, repeats being dropped."""
        found = [np.unique(np.asarray(row, np.int32)) for row in rows]
        ids = np.concatenate([np.zeros(0, np.int32), *found])
        return cls(_offsets(np.array([len(row) for row in found], np.int64)), ids)


def load_label_lists(indexes: Sequence[Index]) -> LabelLists:
    """Labels of every sample, by id over all sources, from their indexes: 4 bytes each, 8 a sample.

    A sample whose list is empty has none. Raises DataError naming a sample without a list of
    integers from 0 on.
    """
    return _join([index_label_lists(index) for index in indexes])


def index_label_lists(index: Index) -> LabelLists:
    """The same of one index, by its own ids."""
    counts, ids, first = [np.zeros(0, np.int64)], [np.zeros(0, np.int32)], 0
    for shard_counts, shard_ids in index.iter_label_lists():
        if (shard_counts < 0).any():
            raise _no_list(index, first + int(shard_counts.argmin()))
        counts.append(shard_counts)
        ids.append(shard_ids)
        first += len(shard_counts)
    return LabelLists(_offsets(np.concatenate(counts)), np.concatenate(ids))


def _join(lists: Sequence[LabelLists]) -> LabelLists:
    if len(lists) == 1:
        return lists[0]
    counts = np.concatenate([each.counts for each in lists])
    return LabelLists(_offsets(counts), np.concatenate([each.ids for each in lists]))


def _offsets(counts: Int64s) -> Int64s:  # (n,) -> (n + 1,)
    offsets = np.zeros(len(counts) + 1, np.int64)
    np.cumsum(counts, out=offsets[1:])
    return offsets


def _no_list(index: Index, sample: int) -> DataError:
    why = index.why_unlabelled(sample, "list of labels")
    return DataError(
        f"{why}; texts against labels need the member `labels` with each text: "
        "nsphere pack xmc writes it"
    )
