"""Votes of the nearest training texts, beside the labels' own scores.

A rare label's row has seen few texts; the texts themselves are still there. As RAE-XMC has it
(Wang et al. 2025, arXiv 2502.10615), a query asks two memories, the labels' rows and the training
texts' rows, and each training text passes its weight on to its own labels. What is mixed are
estimates of one thing, how probable each label is, so that the sum over labels is the mean number
of labels of a text on both sides.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from data.label_lists import LabelLists
from trainer.config import NeighboursConfig
from trainer.evaluate.nearest import NOBODY, sort_keys
from trainer.evaluate.xmc_metrics import NO_LABEL
from trainer.evaluate.xmc_search import Pairs, split_predictions, top_labels

QUERY_TILE = 1024


@dataclass(frozen=True)
class TrainingTexts:
    """The texts that vote: this rank's part of their rows, and the labels of all."""

    rows: Tensor  # (t, d) unit rows
    ids: Tensor  # (t,) int64 rows of `lists`, unique over the ranks
    lists: LabelLists


def add_votes(
    queries: Tensor,  # (n, d) this rank's unit rows
    found: tuple[Tensor, Tensor],  # (n, k) cosines and labels of `top_labels`
    texts: TrainingTexts,
    options: NeighboursConfig,
    group: ProcessGroup | None,
    *,
    left_out: Pairs,
) -> tuple[Tensor, Tensor]:  # (n, k) float32 scores, falling; (n, k) int64 labels
    """The first k by (1 - weight) * own + weight * votes; of equal scores the lower label first.

    own: softmax(cosine / temperature) over the k found, times the training texts' mean number of
    labels; votes: the same softmax over the `options.count` nearest texts, summed over those that
    have the label. Memory: a tile of queries' candidates. Collective.
    """
    cosines, nearest = top_labels(queries, texts.rows, texts.ids, options.count, group)
    mean_labels = float(texts.lists.counts.mean())
    scores, labels = found
    out = torch.full(labels.shape, NOBODY, dtype=torch.int64, device=labels.device)
    for start in range(0, len(queries), QUERY_TILE):
        tile = slice(start, start + QUERY_TILE)
        own = _shares(scores[tile], options.temperature) * mean_labels * (1 - options.weight)
        votes = _shares(cosines[tile], options.temperature) * options.weight
        rows = torch.arange(len(own), device=labels.device)
        voted_by, voted = _labels_of(texts.lists, nearest[tile])
        candidates = _summed(
            torch.cat([rows.repeat_interleave(own.shape[1]), voted_by // nearest.shape[1]]),
            torch.cat([labels[tile].flatten(), voted]),
            torch.cat([own.flatten(), votes.flatten()[voted_by]]),
        )
        hidden = Pairs(left_out.rows - start, left_out.labels)
        out[tile] = _first(*candidates, hidden, like=out[tile])
    return split_predictions(out)


def _shares(cosines: Tensor, temperature: float) -> Tensor:  # (n, c) float64
    """Softmax along the rows; nothing for what is not there (-inf)."""
    return torch.nan_to_num((cosines.double() / temperature).softmax(dim=1))


def _labels_of(lists: LabelLists, nearest: Tensor) -> tuple[Tensor, Tensor]:
    """(p,) place in `nearest`, counted along its rows, and (p,) label, of each label of each."""
    flat = nearest.flatten().cpu().numpy()
    there = np.flatnonzero(flat != NO_LABEL)
    of_texts = lists.of(flat[there])
    places = torch.from_numpy(np.repeat(there, of_texts.counts))
    labels = torch.from_numpy(of_texts.ids.astype(np.int64))
    return places.to(nearest.device), labels.to(nearest.device)


def _summed(rows: Tensor, labels: Tensor, scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Each (row, label) once, by rising row, with the sum of its scores."""
    there = labels != NO_LABEL
    rows, labels, scores = rows[there], labels[there], scores[there]
    width = int(labels.max()) + 1 if len(labels) else 1
    codes, places = torch.unique(rows * width + labels, return_inverse=True)
    sums = scores.new_zeros(len(codes)).index_add_(0, places, scores)
    return codes // width, codes % width, sums


def _first(rows: Tensor, labels: Tensor, scores: Tensor, hidden: Pairs, *, like: Tensor) -> Tensor:
    """(n, k) sort keys of each row's best; NOBODY where there are fewer."""
    keys = sort_keys(scores[:, None], labels[:, None])[:, 0]
    keys[hidden.contain(rows, labels)] = NOBODY
    counts = rows.bincount(minlength=len(like))
    places = torch.arange(len(rows), device=rows.device) - (counts.cumsum(dim=0) - counts)[rows]
    width = max(like.shape[1], int(counts.max()) if len(counts) else 0)
    pool = like.new_full((len(like), width), NOBODY)
    pool[rows, places] = keys
    return pool.topk(like.shape[1], dim=1).values
