"""Nearest neighbours of every row, and Sample4Geo's greedy batches of them.

Up to `EXACT` rows every pair is looked at. Above, the rows are cut into cells of `CELL_ROWS` by two
trees with different seeds, pairs inside a cell are looked at, and the two lists are merged: a
neighbour across a border of one tree is mostly inside a cell of the other. Each cell is searched by
one thread, so that the lists are the same at any number of threads. Memory: 28 bytes a row and
neighbour; where rows have labels that keep them apart, some 100 MB a thread beside.
"""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.label_lists import LabelLists
from data.negatives.layout import SHUFFLE_ROWS, BatchShape, Layout, shuffled, spread
from data.negatives.store import unit_rows
from data.negatives.tree import Rows, Work, balanced_clusters, pieces, read_rows
from data.order import derive_key

Int64s = NDArray[np.int64]
Int32s = NDArray[np.int32]

EXACT = 1 << 14
_BLOCK = 256  # rows whose cosines with a whole cell are looked at together
CELL_ROWS = 1 << 12
_TREES = 2
_CELLS, _DRAWN = 40, 41  # what a key is for


def nearest(
    rows: Rows,  # (N, d)
    ids: Int64s,  # (n,) ascending
    num: int,
    seed: int,
    work: Work,
    *,
    labels: LabelLists | None = None,  # (N rows) those that share one are no neighbours
) -> Int32s:  # (n, num) places in `ids`, the nearest first, equal ones by id; -1: no more
    """Neighbours of each id among `ids` by cosine, itself left out."""
    num_trees = 1 if len(ids) <= EXACT else _TREES
    places = np.full((len(ids), num), -1, np.int32)
    cosines = np.full((len(ids), num), -np.inf, np.float32)
    quiet = Work(work.threads)
    for tree in range(num_trees):
        key = int(derive_key(seed, _CELLS, tree).view(np.int64)[0])
        size = len(ids) if num_trees == 1 else CELL_ROWS
        cells = balanced_clusters(rows, max(1, size), key, ids=ids, work=quiet)
        order = np.searchsorted(ids, cells.order)

        def search(cell: int, cells: Any = cells, order: Int64s = order) -> Int64s:
            mine = order[cells.bounds[cell] : cells.bounds[cell + 1]]
            own = unit_rows(read_rows(rows, ids[mine]))
            if labels is None:
                found, scores = _search_cell(own, num)
            else:
                found, scores = _search_apart(own, num, labels.of(ids[mine]))
            found = np.where(found >= 0, mine[found], -1)
            places[mine], cosines[mine] = _merge(
                np.concatenate([places[mine], found], axis=1),
                np.concatenate([cosines[mine], scores], axis=1),
                num,
            )
            return mine

        with ThreadPoolExecutor(max(1, work.threads)) as pool:
            done = 0
            for mine in pool.map(search, range(len(cells.bounds) - 1)):
                done += len(mine)
                work.report(tree * len(ids) + done, num_trees * len(ids))
    return places


def _search_cell(rows: NDArray[np.float32], num: int) -> tuple[Int64s, NDArray[np.float32]]:
    """(n, k) other rows of the cell and their cosines, at most `num` of them."""
    import faiss  # here: training processes that only read plans need no second OpenMP runtime

    faiss.omp_set_num_threads(1)  # of this thread alone
    count = min(num + 1, len(rows))
    scores, found = faiss.knn(rows, rows, count, metric=faiss.METRIC_INNER_PRODUCT)
    found = found.astype(np.int64)
    own = found == np.arange(len(rows))[:, None]
    return np.where(own, -1, found), np.where(own, -np.inf, scores).astype(np.float32)


def _search_apart(
    rows: NDArray[np.float32], num: int, labels: LabelLists
) -> tuple[Int64s, NDArray[np.float32]]:
    """As `_search_cell`, of rows that share no label with the row."""
    count = min(num, len(rows))
    members = labels.transposed(labels.num_labels)
    found = np.empty((len(rows), count), np.int64)
    scores = np.empty((len(rows), count), np.float32)
    for start in range(0, len(rows), _BLOCK):
        block = np.arange(start, min(start + _BLOCK, len(rows)))
        cosines = rows[block] @ rows.T
        cosines[np.arange(len(block)), block] = -np.inf
        own = labels.of(block)
        alike = members.of(own.ids.astype(np.int64))
        owners = np.repeat(np.repeat(np.arange(len(block)), own.counts), alike.counts)
        cosines[owners, alike.ids] = -np.inf
        best = np.argpartition(-cosines, count - 1, axis=1)[:, :count]
        found[block], scores[block] = best, np.take_along_axis(cosines, best, axis=1)
    return np.where(np.isfinite(scores), found, -1), scores


def _merge(
    places: Int64s, cosines: NDArray[np.float32], num: int
) -> tuple[Int64s, NDArray[np.float32]]:
    """The best `num` of each row's candidates, each once; equal cosines in the order of places."""
    by_place = np.argsort(places, axis=1, kind="stable")
    sorted_places = np.take_along_axis(places, by_place, axis=1)
    again = np.zeros_like(places, np.bool_)
    again[:, 1:] = sorted_places[:, 1:] == sorted_places[:, :-1]
    sorted_cosines = np.take_along_axis(cosines, by_place, axis=1)
    sorted_cosines[again | (sorted_places < 0)] = -np.inf
    best = np.argsort(-sorted_cosines, axis=1, kind="stable")[:, :num]
    cosines = np.take_along_axis(sorted_cosines, best, axis=1)
    places = np.take_along_axis(sorted_places, best, axis=1)
    return np.where(np.isfinite(cosines), places, -1), cosines


def choose_companions(
    lists: Int32s,  # (n, w) neighbours, the nearest first
    num: int,
    seed: int,
) -> Int32s:  # (n, num)
    """Half of a row's companions are its nearest, half drawn from the rest of its list.

    Sample4Geo's Dynamic Similarity Sampling (Deuser et al. 2023, arXiv 2303.11851), section 3.3.
    """
    near = min((num + 1) // 2, lists.shape[1])
    rest = lists.shape[1] - near
    if rest <= num - near:
        return lists[:, :num]
    chosen = np.empty((len(lists), num), np.int32)
    chosen[:, :near] = lists[:, :near]
    for piece in pieces(0, len(lists)):
        rows = np.arange(piece.start, piece.stop)
        words = derive_key(seed, _DRAWN, (rows[:, None] * rest + np.arange(rest)).reshape(-1))
        drawn = np.argsort(words.reshape(-1, rest), axis=1, kind="stable")[:, : num - near]
        chosen[piece, near:] = np.take_along_axis(lists[piece, near:], np.sort(drawn), axis=1)
    return chosen


def pack_greedily(
    ids: Int64s,  # (n,) ascending
    companions: Int32s,  # (n, k) places in `ids`, -1: none
    labels: Int64s | None,  # (n,) no two of a label in a batch, -1: like no other; None: no rule
    loose: Int64s,
    shape: BatchShape,
    seed: int,
) -> Layout:
    """Batch after batch: a keyed anchor, its companions that are still free, the next anchor.

    A step of Python an anchor: 9 microseconds, 19 with labels (200,000 rows, processor time).
    """
    edges = shape.edges()
    rooms = spread(len(ids), edges)
    anchors = iter(shuffled(np.arange(len(ids)), seed, SHUFFLE_ROWS).tolist())
    used = np.zeros(len(ids), np.bool_)
    rule = _OnePerLabel(labels)
    order: list[Int64s] = []
    bounds = [0]
    for room, size in zip(rooms.tolist(), np.diff(edges).tolist(), strict=True):
        rule.begin()
        rest = room
        while rest:
            anchor = next(anchors)
            if used[anchor]:
                continue
            used[anchor] = True
            rule.take(anchor)
            mates = companions[anchor]
            mates = mates[mates >= 0]
            mates = rule.allowed(mates[~used[mates]])[: rest - 1]
            used[mates] = True
            rule.take(mates)
            order.append(np.concatenate([[anchor], mates]).astype(np.int64))
            rest -= len(order[-1])
            bounds.append(bounds[-1] + len(order[-1]))
        bounds += range(bounds[-1] + 1, bounds[-1] + 1 + size - room)
        order.append(np.full(size - room, -1))
    places = np.concatenate(order)
    samples = np.empty(len(places), np.int64)
    samples[places >= 0] = ids[places[places >= 0]]
    samples[places < 0] = loose
    return Layout(samples, np.array(bounds, np.int64), 0)


class _OnePerLabel:
    """Which labels the batch under way holds."""

    def __init__(self, labels: Int64s | None) -> None:
        self._codes = None
        if labels is not None:
            self._codes = np.unique(labels, return_inverse=True)[1].astype(np.int64)
            self._free = labels < 0
            self._held = np.zeros(len(labels) + 1, np.int64)
        self._batch = 0

    def begin(self) -> None:
        self._batch += 1

    def take(self, rows: Any) -> None:
        if self._codes is not None:
            self._held[self._codes[rows]] = self._batch

    def allowed(self, rows: Int32s) -> Int32s:
        """Those whose label is not in the batch, the first of each label, in their order."""
        if self._codes is None:
            return rows
        codes = self._codes[rows]
        first = np.zeros(len(rows), np.bool_)
        first[np.unique(codes, return_index=True)[1]] = True
        return rows[(first & (self._held[codes] != self._batch)) | self._free[rows]]
