"""Approximate search among millions of labels: a navigable graph on each rank (HNSW, by faiss).

Each rank has the graph of its own labels and every rank's queries visit it, so ranks build their
graphs at once; the answer depends on their number and, with several threads, on the moment. What a
graph finds is scored anew as the exact search scores.
"""

import time
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from trainer.collectives import (
    count_ranks,
    gather_rows,
    max_over_ranks,
    own_rank,
    sum_over_ranks,
)
from trainer.config import ConfigError, HnswConfig
from trainer.evaluate.nearest import NOBODY, sort_keys, visit_blocks
from trainer.evaluate.xmc_metrics import NO_LABEL
from trainer.evaluate.xmc_search import Pairs, keep_finite, score_pairs, split_predictions

QUERY_BLOCK = 4096  # queries that visit at once


class Approximate(NamedTuple):
    """What the graphs found, and what that took on the slowest rank."""

    scores: Tensor  # (n, k) float32, falling
    labels: Tensor  # (n, k) int64, NO_LABEL where there are no more
    build_s: float
    search_s: float


def approximate_labels(
    queries: Tensor,  # (n, d) this rank's
    labels: Tensor,  # (m, d) this rank's part of the labels' rows
    label_ids: Tensor,  # (m,) int64 in [0, 2^32), unique over the ranks
    k: int,
    group: ProcessGroup | None,
    config: HnswConfig,
    *,
    left_out: Pairs,
) -> Approximate:
    """As `top_labels`, but for labels that no walk through a graph meets.

    Memory: a graph of this rank's labels ((d + 2 m) numbers of 4 bytes each), a block of queries,
    the answer. Raises ConfigError without faiss. Collective.
    """
    total = int(sum_over_ranks(torch.tensor(len(labels), device=labels.device), group))
    wide = min(total, k + _most_left_out(left_out, len(queries), group))
    began = time.perf_counter()
    graph = _Graph(*keep_finite(labels, label_ids), config)
    built = time.perf_counter()
    whole = queries.isfinite().all(dim=1)
    best = torch.full((len(queries), wide), NOBODY, dtype=torch.int64, device=queries.device)
    place = 0
    sent = (torch.where(whole[:, None], queries, 0.0).float(),)
    for owner, (block,) in visit_blocks(sent, group, QUERY_BLOCK):
        keys = graph.keys(block, wide)
        keys = gather_rows(keys, [len(block)] * count_ranks(group), group)
        if owner == own_rank(group):
            of_ranks = keys.view(-1, len(block), wide).transpose(0, 1).flatten(1)
            best[place : place + len(block)] = of_ranks.topk(wide, dim=1).values
            place += len(block)
    best[~whole] = NOBODY
    best = _without(best, left_out).topk(min(k, wide), dim=1).values
    seconds = queries.new_tensor([built - began, time.perf_counter() - built]).double()
    build_s, search_s = max_over_ranks(seconds, group).tolist()
    return Approximate(*split_predictions(best), build_s, search_s)


def recall_of(
    found: Tensor,  # (s, k) int64 approximate labels of this rank's sampled queries
    exact: Tensor,  # (s, k) int64 exact ones
    ks: tuple[int, ...],
    group: ProcessGroup | None,
) -> dict[int, float]:
    """Share of the exact first k that are among the approximate first k, over all ranks."""
    counts = []
    for k in ks:
        hit = torch.zeros_like(exact[:, :k], dtype=torch.bool)
        for column in found[:, :k].unbind(dim=1):
            hit |= exact[:, :k] == column[:, None]
        there = exact[:, :k] != NO_LABEL
        counts += [(hit & there).sum(), there.sum()]
    totals = sum_over_ranks(torch.stack(counts), group).view(-1, 2).tolist()
    return {k: right / max(1, all_) for k, (right, all_) in zip(ks, totals, strict=True)}


class _Graph:
    """faiss's HNSW over some rows; empty without rows."""

    def __init__(self, rows: Tensor, ids: Tensor, config: HnswConfig) -> None:
        self._rows, self._ids = rows.float(), ids
        self._ef_search = config.ef_search
        self._graph: Any = None
        if len(rows):
            faiss = _import_faiss()
            self._graph = faiss.IndexHNSWFlat(rows.shape[1], config.m, faiss.METRIC_INNER_PRODUCT)
            self._graph.hnsw.efConstruction = config.ef_construction
            self._graph.add(self._rows.cpu().contiguous().numpy())

    def keys(self, queries: Tensor, k: int) -> Tensor:  # (n, d) -> (n, k) sort keys
        """The first k that a walk finds, as exact scores with their ids."""
        keys = torch.full((len(queries), k), NOBODY, dtype=torch.int64, device=queries.device)
        if self._graph is None:
            return keys
        self._graph.hnsw.efSearch = max(self._ef_search, k)
        asked = queries.cpu().contiguous().numpy()
        places = torch.from_numpy(self._graph.search(asked, k)[1]).to(queries.device)
        rows, columns = (places >= 0).nonzero().unbind(dim=1)
        labels = places[rows, columns]
        scores = score_pairs(queries, self._rows, rows, labels)
        keys[rows, columns] = sort_keys(scores[:, None], self._ids[labels, None])[:, 0]
        return keys


def _import_faiss() -> Any:
    try:
        import faiss
    except ImportError:
        raise ConfigError(
            'eval.index = "hnsw" needs faiss: pip install faiss-cpu, or eval.index = "exact"'
        ) from None
    return faiss


def _most_left_out(pairs: Pairs, num_queries: int, group: ProcessGroup | None) -> int:
    """Labels that are left out of the query, on any rank, which has most of them."""
    counts = pairs.rows.bincount(minlength=max(1, num_queries))
    return int(max_over_ranks(counts.max(), group))


def _without(best: Tensor, pairs: Pairs) -> Tensor:
    """The keys, pairs that are left out replaced by NOBODY."""
    labels = split_predictions(best)[1]
    rows = torch.arange(len(best), device=best.device)[:, None].expand_as(labels)
    return best.masked_fill(pairs.contain(rows, labels), NOBODY)
