"""Label texts as further training documents.

Renee (Jain et al., MLSys 2023) trains on each label's text as a document that has the label; where
labels imply one another (a hierarchy), such a document has the implied labels too.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from data.label_lists import LabelLists

Int32s = NDArray[np.int32]

_BLOCK_PAIRS = 1 << 22
"""Pairs of labels that are counted at once: 64 MB."""


def closure(lists: LabelLists, num_labels: int, share: float) -> Iterator[tuple[int, Int32s]]:
    """(label, labels that at least `share` of the documents with it have too), label by label.

    A label is always its own. Counts pairs block by block: beside 30 bytes a positive it takes the
    memory of one block, or of all pairs of the commonest label if those are more.
    """
    documents = lists.transposed(num_labels)
    counts = documents.counts
    lengths = lists.counts
    ends = np.zeros(len(documents.ids) + 1, np.int64)
    np.cumsum(lengths[documents.ids], out=ends[1:])
    pairs = ends[documents.offsets]  # that labels before each label give rise to
    first = 0
    while first < num_labels:
        last = int(np.searchsorted(pairs, pairs[first] + _BLOCK_PAIRS, side="right")) - 1
        last = min(max(last, first + 1), num_labels)
        yield from _of_block(lists, documents, counts, first, last, share)
        first = last


def _of_block(
    lists: LabelLists,
    documents: LabelLists,
    counts: np.ndarray,
    first: int,
    last: int,
    share: float,
) -> Iterator[tuple[int, Int32s]]:
    base = np.int64(len(counts))
    own = documents.of(np.arange(first, last))
    met = lists.of(own.ids.astype(np.int64))
    owners = np.repeat(np.arange(first, last, dtype=np.int64), own.counts)
    keys, times = np.unique(np.repeat(owners, met.counts) * base + met.ids, return_counts=True)
    label, other = np.divmod(keys, base)
    kept = times >= share * counts[label]
    label, other = label[kept], other[kept].astype(np.int32)
    bounds = np.searchsorted(label, np.arange(first, last + 1))
    for number in range(first, last):
        found = other[bounds[number - first] : bounds[number - first + 1]]
        yield number, found if len(found) else np.array([number], np.int32)
