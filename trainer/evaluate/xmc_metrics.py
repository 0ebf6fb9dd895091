"""How good ranked labels are: precision, nDCG, their propensity-scored kin, recall and coverage.

The formulas are those of the extreme classification repository (Bhatia et al.; Jain et al. 2016,
"Extreme multi-label loss functions"), as `pyxclib` computes them. Every query's numbers are made
alone and summed without rounding, so the deal of the queries over ranks does not show.

Rules. A query without labels is left out and counted (pyxclib takes it for a miss). Where there
are fewer than k predictions the missing ones are misses, and precision still divides by k. A
propensity-scored figure is a ratio of two sums over all queries, not a mean of ratios.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from data.errors import DataError
from trainer.collectives import gather_counts, gather_rows, max_over_ranks, sum_over_ranks

KS = (1, 3, 5)
RECALL_KS = (1, 3, 5, 10, 100)
NO_LABEL = -1  # where there are no more predictions
BLOCK = 1 << 16  # queries whose tables stand in memory at once


class Truth(NamedTuple):
    """The labels of queries, as rows of a CSR matrix."""

    offsets: Tensor  # (n + 1,) int64
    labels: Tensor  # (nnz,) int64 rising and unique in a row

    @property
    def counts(self) -> Tensor:  # (n,)
        """Labels of each query."""
        return self.offsets.diff()

    @property
    def rows(self) -> Tensor:  # (nnz,)
        """The query that each label is of."""
        numbers = torch.arange(len(self.offsets) - 1, device=self.offsets.device)
        return numbers.repeat_interleave(self.counts)

    def cut(self, start: int, stop: int) -> "Truth":
        """Those of queries [start, stop)."""
        offsets = self.offsets[start : stop + 1]
        first, last = int(offsets[0]), int(offsets[-1])
        return Truth(offsets - first, self.labels[first:last])


def inverse_propensities(
    train_counts: Tensor,  # (L,) training points of each label
    num_points: int,
    a: float,
    b: float,
) -> Tensor:  # (L,) float64, of a label that is everywhere about 1, larger for a rarer one
    """q = 1 + C (f + B)^-A with C = (ln N - 1) (B + 1)^A: Jain et al. 2016, section 4.

    Raises DataError where that has no meaning: fewer than three points, or f + B = 0.
    """
    if num_points < 3:
        raise DataError(
            f"propensities need at least 3 training points (ln N > 1), the label table counts "
            f"{num_points}: give --labels.table= the table of the training set"
        )
    spread = train_counts.double() + b
    if len(spread) and float(spread.min()) <= 0:
        label = int(spread.argmin())
        raise DataError(
            f"label {label} has {int(train_counts[label])} training points, and f + B = "
            f"{float(spread[label]):g} is not above 0: raise B of labels.propensity"
        )
    return 1 + (math.log(num_points) - 1) * (b + 1) ** a * spread ** (-a)


def label_metrics(
    found: Tensor,  # (n, K) int64 this rank's predictions, best first, then NO_LABEL
    truth: Truth,  # of this rank's queries
    inverse: Tensor,  # (L,) float64 inverse propensities
    group: ProcessGroup | None,
    *,
    ks: Sequence[int] = KS,
    recall_ks: Sequence[int] = RECALL_KS,
) -> dict[str, float]:
    """`xmc_P@k`, `nDCG`, `PSP`, `PSnDCG`, `R` and `C` over all ranks' queries, equal on each.

    C@k (label coverage): of the labels that any query has, the share that is rightly predicted for
    at least one within the first k. Collective; the same at any world size. Raises DataError for a
    label outside [0, L), and when no query has labels.
    """
    _check_labels(truth, len(inverse))
    parts = [
        _score(
            found[start : start + BLOCK],
            truth.cut(start, min(start + BLOCK, len(found))),
            inverse,
            ks,
            recall_ks,
        )
        for start in range(0, max(1, len(found)), BLOCK)
    ]
    counted = torch.cat([part.counted for part in parts])
    totals = torch.stack([counted.sum(), (~counted).sum(), (found[:, :1] == NO_LABEL).sum()])
    num_queries, num_unlabelled, num_silent = sum_over_ranks(totals, group).tolist()
    if num_queries == 0:
        raise DataError(
            f"xmc: none of {num_unlabelled:,} queries has a label: do the evaluated shards have "
            "members `labels`?"
        )
    sums = {
        name: _sum_exactly(torch.cat([part.columns[name] for part in parts]), group)
        for name in parts[0].columns
    }
    numbers = {f"xmc_P@{k}": sums[f"hits@{k}"] / (k * num_queries) for k in ks}
    numbers |= {f"xmc_nDCG@{k}": sums[f"ndcg@{k}"] / num_queries for k in ks}
    for name in ("PSP", "PSnDCG"):
        numbers |= {f"xmc_{name}@{k}": sums[f"{name}@{k}"] / sums[f"best_{name}@{k}"] for k in ks}
    numbers |= {f"xmc_R@{k}": sums[f"recall@{k}"] / num_queries for k in recall_ks}
    return {
        **numbers,
        **_coverage(found, truth, len(inverse), group, ks),
        "num_xmc_queries": num_queries,
        "num_xmc_unlabelled": num_unlabelled,
        "num_xmc_unpredicted": num_silent,
    }


def find_hits(found: Tensor, truth: Truth) -> Tensor:  # (n, K) bool
    """Whether each prediction is a label of its query."""
    if not len(truth.labels):
        return torch.zeros_like(found, dtype=torch.bool)
    width = 1 + max(int(truth.labels.max()), int(found.max()) if found.numel() else 0)
    wanted = truth.rows * width + truth.labels  # rising
    rows = torch.arange(len(found), device=found.device)[:, None]
    codes = rows * width + found
    places = torch.searchsorted(wanted, codes).clamp(max=len(wanted) - 1)
    return (wanted[places] == codes) & (found >= 0)


class _Scores(NamedTuple):
    counted: Tensor  # (n,) bool: has labels
    columns: dict[str, Tensor]  # each (counted,) float64


def _score(
    found: Tensor, truth: Truth, inverse: Tensor, ks: Sequence[int], recall_ks: Sequence[int]
) -> _Scores:
    """Each query's own numbers. Running sums are in order, so neighbours do not change them."""
    deepest = max(*ks, *recall_ks)
    counted = truth.counts > 0
    hits = _widened(find_hits(found, truth)[counted], deepest, False)
    gains = _widened(inverse[found.clamp(min=0)][counted], deepest, 0.0) * hits
    ideal = _ideal_gains(truth, inverse, max(ks))[counted]
    discounts = 1 / torch.log2(
        torch.arange(2.0, max(ks) + 2, dtype=torch.float64, device=found.device)
    )
    sizes = truth.counts[counted]
    num_hits = hits.double().cumsum(dim=1)
    best = discounts.cumsum(dim=0)
    columns = {f"recall@{k}": num_hits[:, k - 1] / sizes for k in recall_ks}
    for k in ks:
        norm = best[sizes.clamp(max=k) - 1]  # (counted,) DCG of a perfect ranking
        first = slice(0, k)
        columns |= {
            f"hits@{k}": num_hits[:, k - 1],
            f"ndcg@{k}": _running(hits[:, first] * discounts[first]) / norm,
            f"PSP@{k}": _running(gains[:, first]),
            f"best_PSP@{k}": _running(ideal[:, first]),
            f"PSnDCG@{k}": _running(gains[:, first] * discounts[first]) / norm,
            f"best_PSnDCG@{k}": _running(ideal[:, first] * discounts[first]) / norm,
        }
    return _Scores(counted, columns)


def _running(rows: Tensor) -> Tensor:  # (n, k) -> (n,)
    """Sums of rows, from left to right."""
    return rows.cumsum(dim=1)[:, -1]


def _widened(rows: Tensor, width: int, blank: float) -> Tensor:  # (n, K) -> (n, width)
    """The first columns, or blank ones behind."""
    if rows.shape[1] >= width:
        return rows[:, :width]
    return torch.cat([rows, rows.new_full((len(rows), width - rows.shape[1]), blank)], dim=1)


def _ideal_gains(truth: Truth, inverse: Tensor, k: int) -> Tensor:  # (n, k) float64 falling
    """The largest inverse propensities among each query's labels, zeros behind."""
    gains = inverse[truth.labels]
    order = gains.sort(descending=True, stable=True).indices
    order = order[truth.rows[order].sort(stable=True).indices]  # by query, then falling
    places = torch.arange(len(order), device=order.device) - truth.offsets[:-1][truth.rows]
    near = places < k
    ideal = inverse.new_zeros((len(truth.counts), k))
    ideal[truth.rows[near], places[near]] = gains[order][near]
    return ideal


def _coverage(
    found: Tensor, truth: Truth, num_labels: int, group: ProcessGroup | None, ks: Sequence[int]
) -> dict[str, float]:
    """By each label's best place in any query: O(L) numbers travel, whatever the queries."""
    deepest = max(ks)
    marks = torch.full((num_labels,), -1, dtype=torch.int32, device=found.device)
    marks[truth.labels] = 0  # some query has it
    for start in range(0, len(found), BLOCK):
        part = found[start : start + BLOCK]
        hits = find_hits(part, truth.cut(start, start + len(part)))
        for place in reversed(range(min(deepest, found.shape[1]))):
            labels = part[:, place][hits[:, place]]
            marks[labels] = marks[labels].clamp(min=deepest - place)
    marks = max_over_ranks(marks, group)
    present = int((marks >= 0).sum())
    covered = {f"xmc_C@{k}": int((marks > deepest - k).sum()) / present for k in ks}
    return {**covered, "num_xmc_labels": num_labels, "num_xmc_labels_present": present}


def _sum_exactly(column: Tensor, group: ProcessGroup | None) -> float:
    """Over all ranks, rounded once: the order in which ranks hold the queries does not show."""
    counts = gather_counts(len(column), group, column.device)
    return math.fsum(gather_rows(column, counts, group).tolist())


def _check_labels(truth: Truth, num_labels: int) -> None:
    if len(truth.labels):
        least, most = int(truth.labels.min()), int(truth.labels.max())
        if least < 0 or most >= num_labels:
            raise DataError(
                f"a query has label {least if least < 0 else most}, and the label table has labels "
                f"0 to {num_labels - 1}: is it the table of this data set (labels.table)?"
            )
