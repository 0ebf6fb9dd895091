"""The k labels of largest score for each query, exactly, over millions of labels in parts.

Scores are those of `nearest`: summed in float64, rounded to float32, of equal ones the lower label
first; so the answer is the same at any world size and tile. But the tiles are float32 products,
many times cheaper to make and to look through: a bound on their error tells which pairs can still
be among the first k, a few in a thousand, and only those are summed in float64.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from trainer.collectives import sum_over_ranks
from trainer.evaluate.nearest import NOBODY, sort_keys, split_keys, visit_blocks
from trainer.evaluate.xmc_metrics import NO_LABEL

QUERY_TILE = 256
LABEL_TILE = 4096
BLOCK_TILES = 32  # label tiles that visit at once
MANY = 16  # more than one pair in so many: the tile is summed in float64 as a whole
DENSE = 64  # one pair in so many: a float64 product of the tile costs less than the pairs alone
PENDING = 16  # candidates a query before they are merged into the first k
CACHED_NUMBERS = 1 << 16  # float64 numbers of pairs' rows at once: what stays in a core's cache
TILE_NUMBERS = 1 << 22  # of a tile that is summed in float64 as a whole

ROUNDING = {"highest": 2.0**-23, "high": 2.0**-9, "medium": 2.0**-6}
"""What `torch.get_float32_matmul_precision` allows a float32 product to lose: by each number of a
row at `highest`, else (TF32, bfloat16) of the whole."""


class Pairs(NamedTuple):
    """Queries of this rank and labels that are not to be predicted for them."""

    rows: Tensor  # (f,) int64
    labels: Tensor  # (f,) int64

    @classmethod
    def none(cls, device: torch.device) -> "Pairs":
        """No pair."""
        nothing = torch.zeros(0, dtype=torch.int64, device=device)
        return cls(nothing, nothing)

    def of(self, chosen: Tensor) -> "Pairs":  # (n,) bool
        """Those of the chosen queries, which are counted anew."""
        here = chosen[self.rows]
        return Pairs((chosen.cumsum(dim=0) - 1)[self.rows[here]], self.labels[here])

    def contain(self, rows: Tensor, labels: Tensor) -> Tensor:
        """Whether (row, label), of one shape, is one of them."""
        if not len(self.rows):
            return torch.zeros_like(labels, dtype=torch.bool)
        width = 1 + max(int(self.labels.max()), int(labels.max()) if labels.numel() else 0)
        codes = (self.rows * width + self.labels).sort().values
        asked = rows * width + labels
        places = torch.searchsorted(codes, asked).clamp(max=len(codes) - 1)
        return (codes[places] == asked) & (labels >= 0)


def top_labels(
    queries: Tensor,  # (n, d) this rank's
    labels: Tensor,  # (m, d) this rank's part of the labels' rows
    label_ids: Tensor,  # (m,) int64 in [0, 2^32), unique over the ranks
    k: int,
    group: ProcessGroup | None,
    *,
    left_out: Pairs | None = None,
    query_tile: int = QUERY_TILE,
    label_tile: int = LABEL_TILE,
) -> tuple[Tensor, Tensor]:  # (n, k) float32 scores, falling; (n, k) int64 labels
    """Top k of all labels, k cut to their number; (-inf, NO_LABEL) where there are fewer.

    A query whose row is not finite has no predictions, a label whose row is not is never one.
    Memory: the answer, a tile and `BLOCK_TILES` tiles' label rows; each label row travels once.
    Collective.
    """
    total = int(sum_over_ranks(torch.tensor(len(labels), device=labels.device), group))
    k = min(k, total)
    best = torch.full((len(queries), k), NOBODY, dtype=torch.int64, device=queries.device)
    pairs = left_out or Pairs.none(queries.device)
    whole = queries.isfinite().all(dim=1)
    queries = torch.where(whole[:, None], queries, 0.0)
    rows, ids = keep_finite(labels, label_ids)
    for _, (block, block_ids) in visit_blocks((rows, ids), group, BLOCK_TILES * label_tile):
        columns = _columns_of(pairs, block_ids)
        for first in range(0, len(queries), query_tile):
            part = slice(first, min(first + query_tile, len(queries)))
            search = _Search(queries[part], best[part])
            for start in range(0, len(block) if k else 0, label_tile):
                tile = slice(start, min(start + label_tile, len(block)))
                search.look(block[tile], block_ids[tile], columns.cut(part, tile))
            best[part] = search.merged()
    best[~whole] = NOBODY
    return split_predictions(best)


def split_predictions(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Scores and labels of sort keys, (-inf, NO_LABEL) for NOBODY."""
    scores, labels = split_keys(keys)
    nobody = keys == NOBODY
    return scores.masked_fill(nobody, -torch.inf), labels.masked_fill(nobody, NO_LABEL)


def keep_finite(rows: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Rows without NaN and infinities, and their ids."""
    whole = rows.isfinite().all(dim=1)
    return (rows, ids) if bool(whole.all()) else (rows[whole], ids[whole])


class _Columns(NamedTuple):
    """Pairs as places in a block of labels, by rising column."""

    rows: Tensor
    columns: Tensor

    def cut(self, part: slice, tile: slice) -> "_Columns":
        """Those in one tile, counted from its corner."""
        if not len(self.rows):
            return self
        bounds = self.columns.new_tensor([tile.start, tile.stop])
        first, last = torch.searchsorted(self.columns, bounds).tolist()
        rows = self.rows[first:last]
        here = (rows >= part.start) & (rows < part.stop)
        return _Columns(rows[here] - part.start, self.columns[first:last][here] - tile.start)


def _columns_of(pairs: Pairs, ids: Tensor) -> _Columns:
    """The pairs whose label is among a block's ids."""
    if not len(pairs.rows) or not len(ids):
        return _Columns(pairs.rows[:0], pairs.labels[:0])
    known, order = ids.sort()
    places = torch.searchsorted(known, pairs.labels).clamp(max=len(known) - 1)
    here = known[places] == pairs.labels
    columns, by_column = order[places[here]].sort()
    return _Columns(pairs.rows[here][by_column], columns)


class _Search:
    """The best labels so far of some queries, and candidates not yet compared with them."""

    def __init__(self, queries: Tensor, best: Tensor) -> None:
        self._queries, self._best = queries.float(), best
        self._norms = torch.linalg.vector_norm(self._queries, dim=1)
        self._pending: list[tuple[Tensor, Tensor]] = []  # rows (c,), keys (c,)
        self._num_pending = 0
        self._least = self._least_scores()

    def look(self, tile: Tensor, ids: Tensor, hidden: _Columns) -> None:
        """Take over a tile of labels."""
        products = self._queries @ tile.T.float()  # (n, t)
        products[hidden] = -torch.inf
        slack = self._norms * _error(tile)
        lowest = self._least - slack
        k = self._best.shape[1]
        if len(ids) >= k and bool(lowest.isneginf().any()):
            # At least k labels of this tile score that much, whatever was rounded.
            near = products.topk(k, dim=1, sorted=False).values.amin(dim=1)
            lowest = torch.maximum(lowest, near - 2 * slack)
        # Not below `lowest`, and never what is hidden.
        below = torch.nextafter(lowest, lowest.new_tensor(-torch.inf))
        places = (products > below[:, None]).nonzero()
        if len(places) * MANY > products.numel() and len(places) > 4 * k * len(products):
            self._look_at_all(tile, ids, hidden)
            return
        rows, columns = places.unbind(dim=1)
        if len(rows) * DENSE > products.numel():
            scores = (self._queries.double() @ tile.double().T)[rows, columns]
        else:
            scores = score_pairs(self._queries, tile, rows, columns)
        self._pending.append((rows, sort_keys(scores[:, None], ids[columns, None])[:, 0]))
        self._num_pending += len(rows)
        if self._num_pending > PENDING * len(self._best):
            self.merged()

    def merged(self) -> Tensor:
        """The best keys of each query, candidates included."""
        if self._num_pending:
            rows = torch.cat([rows for rows, _ in self._pending])
            keys = torch.cat([keys for _, keys in self._pending])
            rows, order = rows.sort()
            counts = rows.bincount(minlength=len(self._best))
            starts = counts.cumsum(dim=0) - counts
            places = torch.arange(len(rows), device=rows.device) - starts[rows]
            pool = keys.new_full((len(self._best), int(counts.max())), NOBODY)
            pool[rows, places] = keys[order]
            self._take(pool)
        self._pending, self._num_pending = [], 0
        return self._best

    def _look_at_all(self, tile: Tensor, ids: Tensor, hidden: _Columns) -> None:
        """Where most of a tile ties, as constant embeddings make it."""
        step = max(1, TILE_NUMBERS // max(1, len(self._best)))
        for start in range(0, len(ids), step):
            part = slice(start, start + step)
            keys = sort_keys(self._queries.double() @ tile[part].double().T, ids[part])
            here = (hidden.columns >= start) & (hidden.columns < start + step)
            keys[hidden.rows[here], hidden.columns[here] - start] = NOBODY
            self._take(keys)

    def _take(self, keys: Tensor) -> None:
        k = self._best.shape[1]
        self._best = torch.cat([self._best, keys], dim=1).topk(k, dim=1).values
        self._least = self._least_scores()

    def _least_scores(self) -> Tensor:  # (n,) float32 of the last of the best, -inf: not k yet
        return split_predictions(self._best[:, -1])[0]


def score_pairs(
    queries: Tensor,  # (n, d)
    labels: Tensor,  # (m, d)
    rows: Tensor,  # (c,) of queries
    columns: Tensor,  # (c,) of labels
) -> Tensor:  # (c,) float64
    """Scores of pairs, summed in float64."""
    step = max(1, CACHED_NUMBERS // max(1, queries.shape[1]))
    parts = [
        torch.linalg.vecdot(queries[rows[part]].double(), labels[columns[part]].double())
        for part in _slices(len(rows), step)
    ]
    return torch.cat(parts) if parts else queries.new_zeros(0, dtype=torch.float64)


def _slices(total: int, step: int) -> Iterator[slice]:
    for start in range(0, total, step):
        yield slice(start, start + step)


def _error(tile: Tensor) -> Tensor:  # ()
    """How far a float32 product with a unit row may lie from the rounded float64 sum."""
    precision = torch.get_float32_matmul_precision()
    share = ROUNDING[precision] * ((tile.shape[1] + 8) if precision == "highest" else 1)
    return torch.linalg.vector_norm(tile.float(), dim=1).amax() * share + 1e-37
