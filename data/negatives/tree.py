"""Balanced recursive 2-means: embeddings -> clusters of one size, the affinity of NGAME's batches.

A split puts the half of a segment that is nearer to one of two centers left, the rest right, a
fixed number of times; halves are cut at cluster bounds, so sizes differ by one at most. Nothing
depends on threads or chance: rows of a segment stay in the order of their ids, every random number
is keyed by (seed, level, segment), equal scores go by id, and sums run in one order.

Segments above `SAMPLE` rows find their two centers on an even sample and are then cut exactly; a
cell of `CELL` rows or fewer is split to the end by one thread. Memory: 30 bytes a row, and 12 bytes
a value of `CELL` rows for each thread; the rows themselves may be a memory map of float16.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from data.errors import DataError
from data.order import derive_key

Int64s = NDArray[np.int64]
Floats = NDArray[np.float32]
Rows = NDArray[np.float16] | NDArray[np.float32]
Progress = Callable[[int, int], None]
"""(rows done, rows in all)."""

CELL = 1 << 16
"""Part of a plan's identity: another value is another plan."""
SAMPLE = 1 << 11
"""Rows that the centers of a larger segment are found on; all of them move centroids by 0.2 %."""
ITERATIONS = 6
"""Assignments of a split; two more make centroids 0.4 % longer for a sixth more time."""

_TREE = 32  # what a key is for; `data/negatives/layout.py` and others go on from 33


class Clusters(NamedTuple):
    """Ids in the order of the tree: neighbours in it are neighbours in space."""

    order: Int64s  # (n,) ids, each once; within a cluster ascending
    bounds: Int64s  # (k + 1,) cluster j is order[bounds[j]:bounds[j + 1]]


class Work(NamedTuple):
    """What may differ between two computations of the same plan."""

    threads: int = 1
    progress: Progress | None = None

    def report(self, done: int, total: int) -> None:
        """Tell whoever wants to know."""
        if self.progress is not None:
            self.progress(done, total)


ONE_THREAD = Work()


class _Sizes(NamedTuple):
    """Where cluster j starts, without a list of them: the larger ones come first."""

    size: int
    larger: int

    def start(self, cluster: Int64s | int) -> Int64s:
        return np.asarray(cluster) * self.size + np.minimum(cluster, self.larger)


def balanced_clusters(
    rows: Rows,  # (N, d)
    cluster_size: int,
    seed: int,
    *,
    ids: Int64s | None = None,  # (n,) ascending: the rows to cluster; None: all
    work: Work = ONE_THREAD,
) -> Clusters:
    """Clusters of `cluster_size` rows, or one fewer where n is no multiple.

    Raises DataError naming the rows that are not finite.
    """
    members = np.arange(len(rows)) if ids is None else np.array(ids, np.int64)
    num = -(-len(members) // cluster_size)
    if not num:
        return Clusters(members, np.zeros(1, np.int64))
    sizes = _Sizes(*divmod(len(members), num))
    bounds = np.asarray(sizes.start(np.arange(num + 1)), np.int64)
    with ThreadPoolExecutor(max(1, work.threads)) as pool:
        _check_finite(rows, members, pool)
        cells = _split_large(rows, members, sizes, num, seed, pool)
        done = 0

        def finish(cell: tuple[int, int, int]) -> int:
            _, first, last = cell
            start, stop = int(sizes.start(first)), int(sizes.start(last))
            mine = members[start:stop]
            members[start:stop] = mine[_split_cell(read_rows(rows, mine), sizes, cell, seed)]
            return stop - start

        for rows_done in pool.map(finish, cells):
            done += rows_done
            work.report(done, len(members))
    return Clusters(members, bounds)


def read_rows(rows: Rows, ids: Int64s) -> Floats:  # (n, d) a copy
    """Rows by id in float32; numpy alone takes ten times as long to widen float16."""
    return torch.from_numpy(np.take(rows, ids, axis=0)).float().numpy()


def pieces(start: int, stop: int) -> Iterator[slice]:
    """[start, stop) in slices of `CELL`, whatever the number of threads."""
    for first in range(start, stop, CELL):
        yield slice(first, min(first + CELL, stop))


def check_finite(rows: Rows, ids: Int64s, work: Work) -> None:
    """DataError naming the first ids whose embeddings are not finite."""
    with ThreadPoolExecutor(max(1, work.threads)) as pool:
        _check_finite(rows, ids, pool)


def _check_finite(rows: Rows, ids: Int64s, pool: ThreadPoolExecutor) -> None:

    def bad(piece: slice) -> Int64s:
        sums = read_rows(rows, ids[piece]).sum(axis=1)  # float16 is too small to overflow float32
        return ids[piece][~np.isfinite(sums)]

    found = np.concatenate([*pool.map(bad, pieces(0, len(ids))), np.zeros(0, np.int64)])
    if len(found):
        raise not_finite(found)


def not_finite(ids: Int64s) -> DataError:
    """The error of embeddings that are no numbers."""
    named = ", ".join(map(str, ids[:8].tolist())) + (", ..." if len(ids) > 8 else "")
    return DataError(
        f"{len(ids):,} embeddings are NaN or infinite, of the samples {named}: the run that wrote "
        "them has diverged, or its samples are bad; plan from an earlier snapshot or write these "
        "rows anew"
    )


def _split_large(
    rows: Rows, members: Int64s, sizes: _Sizes, num: int, seed: int, pool: ThreadPoolExecutor
) -> list[tuple[int, int, int]]:
    """Sort `members` into cells of at most CELL rows: (level, first cluster, last cluster)."""
    open_cells, cells = [(0, 0, num)], []
    while open_cells:
        level, first, last = open_cells.pop()
        start, stop = int(sizes.start(first)), int(sizes.start(last))
        if stop - start <= CELL or last - first == 1:
            cells.append((level, first, last))
            continue
        middle = (first + last + 1) // 2
        _split_segment(
            rows, members[start:stop], int(sizes.start(middle)) - start, (seed, level, first), pool
        )
        open_cells += [(level + 1, middle, last), (level + 1, first, middle)]
    return cells


def _split_segment(
    rows: Rows, members: Int64s, left: int, place: tuple[int, int, int], pool: ThreadPoolExecutor
) -> None:
    """Put `left` of the members first, in place; both halves keep their order."""
    seed, level, first = place
    places = _sample(len(members))
    keys = derive_key(seed, _TREE, level, np.array([first]))
    share = _share(left, len(members))
    _, direction = _halve(read_rows(rows, members[places])[None], share, keys)
    scores = np.empty(len(members), np.float32)

    def score(piece: slice) -> None:
        scores[piece] = _score(read_rows(rows, members[piece])[None], direction)[0]

    list(pool.map(score, pieces(0, len(members))))
    lower = _lowest(scores[None], left)[0]
    members[:] = np.concatenate([members[lower], members[~lower]])


def _split_cell(
    rows: Floats, sizes: _Sizes, cell: tuple[int, int, int], seed: int
) -> Int64s:  # (n,) places of the cell in the tree's order
    """Every split below a cell, level by level; segments of one shape at a time."""
    level, first, last = cell
    offset = int(sizes.start(first))
    order = np.arange(len(rows))
    edges = np.array([first, last])
    while (np.diff(edges) > 1).any():
        firsts, lasts = edges[:-1], edges[1:]
        middles = (firsts + lasts + 1) // 2
        starts = sizes.start(firsts) - offset
        lengths = sizes.start(lasts) - offset - starts
        lefts = sizes.start(middles) - offset - starts
        shapes = np.where(lasts - firsts > 1, lengths * (len(rows) + 1) + lefts, 0)
        for shape in np.unique(shapes[shapes > 0]):
            alike = np.flatnonzero(shapes == shape)
            length, left = int(lengths[alike[0]]), int(lefts[alike[0]])
            places = starts[alike, None] + np.arange(length)  # (g, s)
            mine = order[places]
            keys = derive_key(seed, _TREE, level, firsts[alike])
            if length > SAMPLE:
                _, direction = _halve(rows[mine[:, _sample(length)]], _share(left, length), keys)
                lower = _lowest(_score(rows[mine], direction), left)
            else:
                lower, _ = _halve(rows[mine], left, keys)
            order[places[:, :left]] = mine[lower].reshape(len(alike), left)
            order[places[:, left:]] = mine[~lower].reshape(len(alike), length - left)
        edges = np.unique(np.concatenate([edges, middles]))
        level += 1
    return order


def _halve(
    rows: Floats,  # (g, s, d) segments of one length
    left: int,
    keys: NDArray[np.uint64],  # (g,)
) -> tuple[NDArray[np.bool_], Floats]:  # (g, s) the `left` rows that go left, (g, d) direction
    """Balanced 2-means from two keyed members; rows' scores are `rows @ direction`."""
    num, length, _ = rows.shape
    one = (keys % np.uint64(length)).astype(np.int64)
    step = ((keys >> np.uint64(32)) % np.uint64(length - 1)).astype(np.int64)
    segments = np.arange(num)
    direction = rows[segments, (one + 1 + step) % length] - rows[segments, one]
    totals = rows.sum(axis=1)
    lower = np.zeros((num, length), np.bool_)
    for iteration in range(ITERATIONS):
        lower = _lowest(_score(rows, direction), left)
        if iteration < ITERATIONS - 1:
            sums = np.einsum("gsd,gs->gd", rows, lower.astype(np.float32))
            direction = _unit(totals - sums) - _unit(sums)
    return lower, direction


def _sample(length: int) -> Int64s:  # (SAMPLE,)
    """Places spread evenly over a segment."""
    return np.arange(SAMPLE) * length // SAMPLE


def _share(left: int, length: int) -> int:
    """How many of a sample go left where `left` of `length` do."""
    return max(1, min(SAMPLE - 1, SAMPLE * left // length))


def _score(rows: Floats, direction: Floats) -> Floats:  # (g, s, d), (g, d) -> (g, s)
    # einsum's own loops: BLAS may sum in another order for another number of threads.
    scores: Floats = np.einsum("gsd,gd->gs", rows, direction)
    return scores


def _unit(rows: Floats) -> Floats:
    lengths: Floats = np.sqrt(np.einsum("gd,gd->g", rows, rows))[:, None]
    lengths[lengths == 0] = 1
    return rows / lengths


def _lowest(scores: Floats, num: int) -> NDArray[np.bool_]:  # both (g, s)
    """The `num` lowest of each row; equal scores in the order of their places."""
    limits = np.partition(scores, num - 1, axis=1)[:, num - 1 : num]
    lower = scores <= limits
    surplus = lower.sum(axis=1) - num
    tied = np.flatnonzero(surplus)
    if len(tied):
        equal = scores[tied] == limits[tied]
        wanted = equal.sum(axis=1) - surplus[tied]
        lower[tied] &= ~equal | (np.cumsum(equal, axis=1) <= wanted[:, None])
    return lower
