"""Texts against labels: every query's best labels among all there are, and how right they are.

What `nsphere eval --task xmc` tells and training in between. A query is a sample's first text; its
scores are cosines with the labels' rows, which a tower makes of their texts or classifiers are,
mixed, if `eval.neighbours` says so, with the votes of the nearest training texts. The
protocol is told with the figures: propensities by `labels.propensity` and the label table's counts
of the training points, pairs of the filter list taken out before the first k are cut, of equal
scores the lower label first.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from data.errors import DataError
from data.index import Index
from data.label_lists import LabelLists
from data.label_table import LabelTable
from data.loader import EvalBatch
from trainer.collectives import max_over_ranks, sum_over_ranks
from trainer.config import Config, EvalConfig, LabelsConfig
from trainer.evaluate.towers import Towers
from trainer.evaluate.xmc_file import write_predictions
from trainer.evaluate.xmc_hnsw import approximate_labels, recall_of
from trainer.evaluate.xmc_metrics import (
    KS,
    RECALL_KS,
    Truth,
    inverse_propensities,
    label_metrics,
)
from trainer.evaluate.xmc_neighbours import TrainingTexts, add_votes
from trainer.evaluate.xmc_search import Pairs, top_labels
from trainer.ranks import Ranks

RowsOfLabels = Callable[[Towers], Tensor]
"""(m, d) unit rows of this rank's part of the labels, as they are now. Collective."""

RowsOfTexts = Callable[[Towers], TrainingTexts]
"""The training texts that vote, as they are embedded now. Collective."""


@dataclass(frozen=True)
class LabelFacts:
    """What an evaluation set says of its queries, by sample id."""

    table: LabelTable
    lists: LabelLists
    left_out: LabelLists  # of the filter list


class Queries(NamedTuple):
    """This rank's queries."""

    rows: Tensor  # (n, d) unit rows
    ids: Tensor  # (n,) int64 sample id, on the CPU
    num_bad: int  # samples left out because they cannot be read


def evaluate_labels(
    model: nn.Module,
    batches: Iterable[EvalBatch],  # this rank's, perhaps none
    index: Index,
    facts: LabelFacts,
    first_label: int,  # of this rank's part
    label_rows: RowsOfLabels,
    config: Config,
    ranks: Ranks,
    *,
    autocast: torch.dtype | None = None,
    training_texts: RowsOfTexts | None = None,
) -> dict[str, float]:
    """Plain numbers over all queries of all ranks; the same dict on every rank.

    The model is in evaluation mode meanwhile. Writes `eval.predictions`. Raises DataError when
    there is nothing to evaluate. Collective.
    """
    towers = Towers(model, ranks, batch_size=config.eval.batch_size, autocast=autocast)
    was_training = model.training
    model.eval()
    try:
        queries = embed_queries(towers, batches)
        rows = label_rows(towers).to(ranks.device)
        voters = training_texts(towers) if training_texts is not None else None
    finally:
        model.train(was_training)
    device = ranks.device
    counts = torch.tensor([len(queries.ids), queries.num_bad], device=device)
    num_texts, num_bad = sum_over_ranks(counts, ranks.group).tolist()
    if num_texts == 0:
        raise DataError("there is no sample to evaluate")
    label_ids = first_label + torch.arange(len(rows), device=device)
    search = _Search(rows, label_ids, config.labels.top, config.eval, ranks.group)
    left_out = _pairs(facts.left_out.of(queries.ids.numpy()), device)
    (scores, found), of_search = search.run(queries, left_out, num_texts)
    if voters is not None:
        scores, found = add_votes(
            queries.rows,
            (scores, found),
            voters,
            config.eval.neighbours,
            ranks.group,
            left_out=left_out,
        )
        of_search["num_xmc_neighbours"] = config.eval.neighbours.count
    if config.eval.predictions:
        keys = [entry.key for entry in index.entries(queries.ids.numpy())]
        write_predictions(Path(config.eval.predictions), keys, found, scores, ranks)
    truth = _truth(facts.lists.of(queries.ids.numpy()), device)
    num_hidden = sum_over_ranks(torch.tensor(len(left_out.rows), device=device), ranks.group)
    return {
        "num_texts": num_texts,
        "num_bad": num_bad,
        **_scored(found, truth, facts.table, config.labels, ranks),
        **of_search,
        "num_xmc_filtered": int(num_hidden),
    }


def embed_queries(towers: Towers, batches: Iterable[EvalBatch]) -> Queries:
    """The first text of every sample. Collective."""
    ids, num_bad = [torch.zeros(0, dtype=torch.int64)], 0

    def iter_tokens() -> Iterator[Tensor]:
        nonlocal num_bad
        for batch in batches:
            owners = batch.text_owner
            is_first = torch.ones_like(owners, dtype=torch.bool)
            is_first[1:] = owners[1:] != owners[:-1]
            ids.append(batch.ids[owners[is_first]])
            num_bad += len(batch.bad)
            yield batch.texts[is_first]

    rows = towers.embed_queries(iter_tokens())
    return Queries(rows, torch.cat(ids), num_bad)


def _scored(
    found: Tensor, truth: Truth, table: LabelTable, options: LabelsConfig, ranks: Ranks
) -> dict[str, float]:
    """The metrics; those with propensities only where the table has the counts they rest on."""
    a, b = options.propensity
    known = table.num_points > 0
    inverse = torch.ones(table.num_labels, dtype=torch.float64)
    if known:
        inverse = inverse_propensities(torch.from_numpy(table.train_count), table.num_points, a, b)
    numbers = label_metrics(
        found,
        truth,
        inverse.to(found.device),
        ranks.group,
        ks=[k for k in KS if k <= options.top],
        recall_ks=[k for k in RECALL_KS if k <= options.top],
    )
    if not known:
        return {name: value for name, value in numbers.items() if not name.startswith("xmc_PS")}
    protocol = {"xmc_propensity_A": a, "xmc_propensity_B": b, "num_xmc_points": table.num_points}
    return {**numbers, **protocol}


@dataclass(frozen=True)
class _Search:
    """All labels' rows, in parts over the ranks, and how they are looked through."""

    rows: Tensor
    ids: Tensor
    k: int
    config: EvalConfig
    group: ProcessGroup | None

    def run(
        self, queries: Queries, left_out: Pairs, num_queries: int
    ) -> tuple[tuple[Tensor, Tensor], dict[str, float]]:
        """(scores, labels), each (n, k), and what there is to tell of the search."""
        if self.config.index == "exact":
            return self._exact(queries.rows, left_out), {}
        options = self.config.hnsw
        found = approximate_labels(
            queries.rows, self.rows, self.ids, self.k, self.group, options, left_out=left_out
        )
        stride = math.ceil(num_queries / options.sample)
        sample = (queries.ids % stride == 0).to(queries.rows.device)
        began = time.perf_counter()
        exact = self._exact(queries.rows[sample], left_out.of(sample))[1]
        seconds = sample.new_tensor([time.perf_counter() - began], dtype=torch.float64)
        ks = tuple(k for k in sorted({*RECALL_KS, self.k}) if k <= self.k)
        recalls = recall_of(found.labels[sample], exact, ks, self.group)
        return (found.scores, found.labels), {
            **{f"xmc_hnsw_recall@{k}": recall for k, recall in recalls.items()},
            "xmc_hnsw_build_s": found.build_s,
            "xmc_hnsw_search_s": found.search_s,
            "xmc_exact_sample_s": float(max_over_ranks(seconds, self.group)),
            "num_xmc_sample": int(sum_over_ranks(sample.sum(), self.group)),
        }

    def _exact(self, queries: Tensor, left_out: Pairs) -> tuple[Tensor, Tensor]:
        return top_labels(queries, self.rows, self.ids, self.k, self.group, left_out=left_out)


def _truth(lists: LabelLists, device: torch.device) -> Truth:
    ids = torch.from_numpy(lists.ids.astype(np.int64))
    return Truth(torch.from_numpy(lists.offsets).to(device), ids.to(device))


def _pairs(lists: LabelLists, device: torch.device) -> Pairs:
    truth = _truth(lists, device)
    return Pairs(truth.rows, truth.labels)
