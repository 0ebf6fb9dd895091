"""What losses of queries against labels share: labels stay on their rank, queries visit.

Which labels are a query's own is a list of any length; of it only integers travel, and what a tile
needs to know is a span of the sorted pairs (query, label), never a table of queries by labels.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from trainer.collectives import gather_counts, gather_rows, own_rank
from trainer.losses.checks import check_per_row, check_rows, check_scalar
from trainer.similarity.pair_list import PairList
from trainer.similarity.pairs import Pairs, Tile


class Positives(NamedTuple):
    """The labels of this rank's queries: those of query i are labels[offsets[i]:offsets[i + 1]]."""

    offsets: Tensor  # (n + 1,) int64
    labels: Tensor  # (nnz,) int64 global label ids, in any order


class Inputs(NamedTuple):
    """What every loss of queries against labels is given."""

    queries: Tensor  # (n, d)
    labels: Tensor  # (m, d)
    scale: Tensor  # () or (1,)
    positives: Positives
    label_ids: Tensor  # (m,) int
    drawn: Tensor | None  # (n,) int, -1: none
    row_weights: Tensor | None = None  # (n,) of the queries' losses, none below 0; None: all 1

    def check(self) -> None:
        """Raise ValueError for what this rank can see alone."""
        queries, labels, _, (offsets, ids), *_ = self
        check_rows(queries=queries)
        check_rows(labels=labels)
        if queries.shape[1] != labels.shape[1]:
            shapes = f"queries are {tuple(queries.shape)}, labels {tuple(labels.shape)}"
            raise ValueError(f"{shapes}: both need one width")
        check_scalar("scale", self.scale)
        check_per_row("label_ids", self.label_ids, labels)
        check_per_row("drawn", self.drawn, queries)
        if self.row_weights is not None and len(self.row_weights) != len(queries):
            raise ValueError(f"{len(self.row_weights)} row_weights for {len(queries)} queries")
        check_per_row("positives.labels", ids, ids)
        check_per_row("positives.offsets", offsets, offsets)
        right = len(offsets) == len(queries) + 1 and int(offsets[0]) == 0
        if not right or int(offsets[-1]) != len(ids) or bool((offsets.diff() < 0).any()):
            raise ValueError(
                f"positives.offsets of {len(queries)} queries is {_shown(offsets)}: give"
                f" {len(queries) + 1} numbers that rise from 0 to the number of labels, {len(ids)}"
            )


@dataclass(frozen=True)
class Listed:
    """Pairs of this rank's labels (rows) with the queries of all ranks (columns): the logits.

    A label counts once, at its first row in the order of the ranks; `pairs` holds no other row.
    p is the number of positive pairs whose label counts on this rank.
    """

    queries: Tensor
    """(n, d) in the dtype of computation, float32 or better."""
    scale: float
    sharpness: float
    """Logits are sharpness * scale * cosine."""
    pairs: Pairs
    num_labels: int
    """L, distinct labels of all ranks."""
    first_name: int
    """Row r of this rank is named first_name + r among all ranks' rows."""
    positives: PairList
    """(p,) rows and columns."""
    drawn: Tensor
    """(p,) bool: the positive pulls; the others are masked."""
    num_positives: Tensor
    """(N,) drawn positives of each query, on any rank, in the dtype of computation."""
    num_masked: Tensor
    """(N,) positives not drawn."""
    kept: Tensor | None
    """Positions of `pairs.rows` among the m rows that were given; None: all count."""
    num_rows: int
    """m."""
    labels_are_parts: bool
    row_weights: Tensor | None
    """(N,) what each query's loss is multiplied by; None: 1."""

    @property
    def share(self) -> float:
        """W/N: what turns a sum over this rank's queries into its term of the mean over ranks."""
        return self.pairs.world_size / max(self.pairs.num_columns, 1)

    def mean(self, losses: Tensor) -> Tensor:  # (N,) -> ()
        """This rank's term of the mean over ranks."""
        return self.pairs.own(losses).sum() * self.share

    def take_positives(self, tile: Tile, logits: Tensor) -> None:
        """Note the tile's positives in `logits`, (p,), and leave -inf in their places."""
        span, at = self.positives.at(tile)
        logits[span] = tile.values[at]
        tile.values[at] = -torch.inf

    def per_positive(self, by_query: Tensor) -> Tensor:  # (N, ...) -> (p, ...)
        """What is known of the query of each positive."""
        return by_query[self.positives.columns]

    def mean_over_positives(self, terms: Tensor) -> Tensor:  # (p, ...) -> (N, ...)
        """The mean over each query's drawn positives on all ranks, 0 for a query without any, times
        the query's weight: so weights reach values and pair weights alike.
        """
        weights = self.drawn / self.per_positive(self.num_positives.clamp(min=1))
        sums = terms.new_zeros(self.pairs.num_columns, *terms.shape[1:])
        weighted = terms * weights.view(-1, *[1] * (terms.ndim - 1))
        sums.index_add_(0, self.positives.columns, weighted)
        merged = self.pairs.merge_columns(sums, lambda shares: shares.sum(0))
        if self.row_weights is None:
            return merged
        return merged * self.row_weights.view(-1, *[1] * (terms.ndim - 1))

    def pulls(self, slopes: Tensor) -> Tensor:  # (p,) -> (p,)
        """The share of each positive's slope in its query's loss, times the query's weight; 0 where
        it is not drawn.
        """
        shares = slopes * self.drawn / self.per_positive(self.num_positives.clamp(min=1))
        return shares if self.row_weights is None else shares * self.per_positive(self.row_weights)

    def gradients(
        self,
        weights_of: Callable[[Tile], Tensor],  # (m, k) d(sum of losses)/dlogit
        needed: tuple[bool, ...],  # of queries, labels, scale
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of queries, labels and scale, None where not needed."""
        visitors = needed[0] or needed[2]
        return self.scaled(
            *self.pairs.gradients(weights_of, rows=needed[1], visitors=visitors), needed
        )

    def scaled(
        self, rows: Tensor, visitors: Tensor, needed: tuple[bool, ...]
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of queries, labels and scale from the sums of the last sweep.

        The scale's is the inner product of the queries with their own gradients, each of logit over
        scale. Labels are complete where they lie: their gradient is the global loss's, and times W
        where it will be averaged over ranks.
        """
        factor = self.sharpness * self.scale
        for_queries, for_labels, for_scale = needed[:3]
        slope = (visitors * self.queries).sum() * (self.sharpness * self.share)
        if for_labels:
            rows.mul_(factor * self.share / (self.pairs.world_size if self.labels_are_parts else 1))
            if self.kept is not None:
                rows = rows.new_zeros(self.num_rows, rows.shape[1]).index_copy_(0, self.kept, rows)
        return (
            visitors.mul_(factor * self.share) if for_queries else None,
            rows if for_labels else None,
            slope if for_scale else None,
        )


def list_pairs(
    inputs: Inputs,
    group: ProcessGroup | None,
    *,
    labels_are_parts: bool,
    tile: int | None,
    sharpness: float = 1.0,
    swept_once: bool = False,
) -> Listed:
    """Check the inputs, bring them to the dtype of computation and find the positives' places."""
    inputs.check()
    queries, labels, scale, positives, label_ids, drawn, row_weights = inputs
    device = queries.device
    dtype = torch.promote_types(torch.promote_types(queries.dtype, labels.dtype), torch.float32)
    known = _know_labels(label_ids.to(device), group)
    kept = known.own_rows()
    rows = labels if kept is None else labels[kept]
    factor = sharpness * float(scale)
    pairs = Pairs(rows.to(dtype), queries, group, factor=factor, tile=tile, swept_once=swept_once)
    everyone = _gather_positives(pairs, positives, drawn, group)
    found = _find(everyone, known)
    num_columns = pairs.num_columns
    here = (found.places >= known.start) & (found.places < known.start + len(labels))
    own = found.places[here] - known.start
    if kept is not None:
        own = torch.searchsorted(kept, own)
    listed = PairList(pairs, own, found.columns[here])
    return Listed(
        queries=queries.to(dtype),
        scale=float(scale),
        sharpness=sharpness,
        pairs=pairs,
        num_labels=len(known.ids),
        first_name=known.start,
        positives=listed,
        drawn=found.drawn[here][listed.order],
        num_positives=found.columns[found.drawn].bincount(minlength=num_columns).to(dtype),
        num_masked=found.columns[~found.drawn].bincount(minlength=num_columns),
        kept=kept,
        num_rows=len(labels),
        labels_are_parts=labels_are_parts,
        row_weights=None if row_weights is None else pairs.gather(row_weights.to(device, dtype)),
    )


def _shown(values: Tensor) -> str:
    numbers = values.tolist()
    return str(numbers if values.numel() <= 8 else [*numbers[:4], "...", *numbers[-2:]])


class _Known(NamedTuple):
    """The distinct labels of all ranks, sorted by id."""

    ids: Tensor  # (L,)
    places: Tensor  # (L,) the first row of each label among all ranks' rows
    start: int  # of this rank's rows
    num_rows: int  # of this rank

    def own_rows(self) -> Tensor | None:
        """Ascending positions of this rank's rows that count; None: all of them."""
        own = self.places[(self.places >= self.start) & (self.places < self.start + self.num_rows)]
        return None if len(own) == self.num_rows else own.sub(self.start).sort().values


def _know_labels(label_ids: Tensor, group: ProcessGroup | None) -> _Known:
    counts = gather_counts(len(label_ids), group, label_ids.device)
    ids = gather_rows(label_ids, counts, group)
    start = sum(counts[: own_rank(group)])
    places = torch.arange(len(ids), device=ids.device)
    if not bool((ids[1:] > ids[:-1]).all()):  # parts of all labels come sorted
        ids, order = ids.sort(stable=True)
        first = _first_of_equals(ids)
        ids, places = ids[first], order[first]
    return _Known(ids, places, start, len(label_ids))


def _first_of_equals(ascending: Tensor) -> Tensor:  # (s,) -> (s,) bool
    first = torch.ones_like(ascending, dtype=torch.bool)
    first[1:] = ascending[1:] != ascending[:-1]
    return first


class _Everyone(NamedTuple):
    """The positives of all ranks' queries."""

    columns: Tensor  # (s,) which query
    labels: Tensor  # (s,) ids
    drawn: Tensor  # (s,) bool


def _gather_positives(
    pairs: Pairs, positives: Positives, drawn: Tensor | None, group: ProcessGroup | None
) -> _Everyone:
    """Every rank raises ValueError where any rank drew a label that is not the query's."""
    device = pairs.device
    lengths = pairs.gather(positives.offsets.to(device).diff())
    own = positives.labels.to(device, torch.int64)
    labels = gather_rows(own, gather_counts(len(own), group, device), group)
    queries = torch.arange(pairs.num_columns, device=device)
    columns = queries.repeat_interleave(lengths)
    if drawn is None:
        return _Everyone(columns, labels, torch.ones_like(labels, dtype=torch.bool))
    wanted = pairs.gather(drawn.to(device, torch.int64))
    is_drawn = labels == wanted[columns]
    missing = wanted >= 0
    missing[columns[is_drawn]] = False
    if missing.any():
        query = int(missing.nonzero()[0])
        raise ValueError(
            f"drawn label {int(wanted[query])} is no positive of query {query} of the global batch:"
            " draw from its own labels, or give -1 for none"
        )
    return _Everyone(columns, labels, is_drawn)


class _Found(NamedTuple):
    """Distinct positives whose label has a row on some rank."""

    columns: Tensor  # (s,)
    places: Tensor  # (s,) of the label among all ranks' rows
    drawn: Tensor  # (s,) bool


def _find(everyone: _Everyone, known: _Known) -> _Found:
    index = torch.searchsorted(known.ids, everyone.labels)
    present = index < len(known.ids)
    present[present.clone()] = known.ids[index[present]] == everyone.labels[present]
    columns, index, drawn = everyone.columns[present], index[present], everyone.drawn[present]
    keys, order = (columns * len(known.ids) + index).sort()
    order = order[_first_of_equals(keys)]  # a label named twice by a query is one positive
    return _Found(columns[order], known.places[index[order]], drawn[order])
