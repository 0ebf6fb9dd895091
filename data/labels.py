"""Labels of a training set before step 1: whether they count from 0, and how often each comes."""

import os
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from data.dataset import SampleSet
from data.errors import DataError
from data.identities import check_dense, count_identities, largest_label
from data.names import IDENTITIES, check_one_to_one, read_identities
from data.shards import local_path

Int64s = NDArray[np.int64]


def check_labels(samples: SampleSet, num_classes: int = 0) -> int:
    """The number of classes C, once every label is known to lie in [0, C); 0 takes the largest + 1.

    Raises DataError naming a sample without a label, with one that is no integer, or outside, and
    where the tables of identities beside the shards disagree.
    """
    named_identities(samples)
    found = [(*largest_label(index), index) for index in samples.indexes]
    largest, holder, index = max(found, key=lambda each: each[0])
    name = index.entries([holder])[0].name
    if num_classes and largest >= num_classes:
        raise DataError(
            f"{name} has the label {largest}, and centers.num_classes = {num_classes} takes labels "
            f"0 to {num_classes - 1}: set it to {largest + 1} or 0 (the labels tell), or leave the "
            "sample out"
        )
    if not num_classes:
        check_dense(largest, samples.num_samples, name)
    return num_classes or largest + 1


def identity_counts(samples: SampleSet, num_classes: int) -> Int64s:  # (num_classes,)
    """Images of each identity over all sources; labels as `check_labels` has passed them."""
    columns = chain.from_iterable(index.iter_column("label") for index in samples.indexes)
    return count_identities(columns, num_classes)


def named_identities(samples: SampleSet) -> pa.Table | None:
    """The tables beside all shards as one, columns cls and name; None where there is none.

    Raises DataError where two of them call a class differently, or number an identity differently.
    """
    tables, origins = [], list[str]()
    for path in _iter_paths([info.url for index in samples.indexes for info in index.shards]):
        tables.append(read_identities(path))
        origins += [str(path)] * len(tables[-1])
    if not tables:
        return None
    table = pa.concat_tables(tables)
    if len(tables) > 1:
        table = check_one_to_one(table, origins)
    return table


def _iter_paths(shards: Sequence[str]) -> Iterator[Path]:
    paths = [local_path(shard) for shard in shards]
    for folder in dict.fromkeys(os.path.dirname(path) for path in paths if path is not None):
        path = Path(folder, IDENTITIES)
        if path.is_file():
            yield path
