"""Labels of a training set before step 1: whether they count from 0, and how often each comes."""

from itertools import chain

import numpy as np
from numpy.typing import NDArray

from data.dataset import SampleSet
from data.errors import DataError
from data.identities import check_dense, count_identities, largest_label

Int64s = NDArray[np.int64]


def check_labels(samples: SampleSet, num_classes: int = 0) -> int:
    """The number of classes C, once every label is known to lie in [0, C); 0 takes the largest + 1.

    Raises DataError naming a sample without a label, with one that is no integer, or outside.
    """
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
