"""Labels of a training set: whether they count from 0, and how many images each identity has.

Everything here streams over the index, shard by shard; no image is read.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from data.dataset import SampleSet, sample_name
from data.errors import DataError
from data.index import Entry

Int64s = NDArray[np.int64]

_SPARSE = 16
"""Labels that need so many times more classes than there are samples are other people's ids."""


def check_labels(samples: SampleSet, num_classes: int = 0) -> int:
    """The number of classes C, once every label is known to lie in [0, C); 0 takes the largest + 1.

    Raises DataError naming a sample without a label, with one that is no integer, or outside.
    """
    largest, holder = -1, 0
    for first, labels in _iter_labels(samples):
        if not len(labels):
            continue
        if labels.min() < 0:
            raise _no_label(samples, first + int(labels.argmin()))
        at = int(labels.argmax())
        if labels[at] > largest:
            largest, holder = int(labels[at]), first + at
    if num_classes and largest >= num_classes:
        raise DataError(
            f"{_name(samples, holder)} has the label {largest}, and centers.num_classes = "
            f"{num_classes} takes labels 0 to {num_classes - 1}: set it to {largest + 1} or 0 "
            "(the labels tell), or leave the sample out"
        )
    found = num_classes or largest + 1
    if not num_classes and found > _SPARSE * samples.num_samples:
        raise DataError(
            f"{_name(samples, holder)} has the label {largest}, and there are only "
            f"{samples.num_samples:,} samples: labels are class numbers from 0 on; renumber them, "
            f"or set centers.num_classes to {found} if it is meant"
        )
    return found


def identity_counts(samples: SampleSet, num_classes: int) -> Int64s:  # (num_classes,)
    """Images of each identity over all sources; labels as `check_labels` has passed them."""
    counts = np.zeros(num_classes, np.int64)
    for _, labels in _iter_labels(samples):
        present, images = np.unique(labels, return_counts=True)
        counts[present] += images
    return counts


def _iter_labels(samples: SampleSet) -> Iterator[tuple[int, Int64s]]:
    """(id of the first sample, labels) of each shard of each source."""
    for offset, index in zip(samples.offsets.tolist(), samples.indexes, strict=False):
        first = offset
        for labels in index.iter_column("label"):
            yield first, labels
            first += len(labels)


def _no_label(samples: SampleSet, sample: int) -> DataError:
    entry = _entry(samples, sample)
    told = [
        problem.detail
        for index in samples.indexes
        for problem in index.problems
        if (problem.kind, problem.shard, problem.key) == ("bad_label", entry.shard, entry.key)
    ]
    endings = ", ".join(part.ending for part in entry.parts)
    why = told[0] if told else f"it has no integer label, only {endings}"
    return DataError(
        f"{sample_name(entry)}: {why}; classes need one for each image: repair or leave out "
        "the sample, or set data.label_key to the ending of the label member"
    )


def _entry(samples: SampleSet, sample: int) -> Entry:
    return samples.entries(np.array([sample], np.int64))[0]


def _name(samples: SampleSet, sample: int) -> str:
    return sample_name(_entry(samples, sample))
