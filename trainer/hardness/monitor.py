"""Live hardness: measured where the loss is, of the same embeddings, at the steps that are logged.

Sampled rows travel to the columns: O(N) integers and some rows a rank, never the columns. So a
measurement is O(rows x columns / W) work on a rank, whatever the way of visiting.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from data.batch import Batch
from trainer.collectives import gather_counts, gather_rows, own_rank
from trainer.config import Config
from trainer.duration import Duration
from trainer.evaluate.cosines import count_cosines
from trainer.hardness.sample import Sampled, choose_columns, find, sample_rows
from trainer.hardness.statistics import RowStatistics, Table, cosines_with, reduce_columns
from trainer.similarity.closed_form import plain_arithmetic

ClustersOf = Callable[[Tensor], Tensor | None]
"""Positions (n,) int64 on the CPU -> number of each one's cluster in its plan, below 0 for none;
None: not planned by embeddings."""


class Keyed(NamedTuple):
    """This rank's columns by key: class centers, or embeddings of labels."""

    keys: Tensor
    """(m,) int64 rising; where labels are drawn in any order, and below 0 for none."""
    read: Callable[[Tensor], Tensor]
    """(k,) places among the m -> (k, d) unit rows, or (k, c, d) of which the nearest counts."""


class Hardness:
    """Numbers of a few rows of the global batch and what the loss held against them.

    In steps that are due, every rank calls the method of the run's kind. Every number is equal on
    every rank, and the same at any world size to rounding.
    """

    def __init__(
        self,
        seed: int,
        group: ProcessGroup | None,
        *,
        due: Callable[[int], bool],  # of a step's number, from 0
        clusters_of: ClustersOf | None = None,
    ) -> None:
        self._seed, self._group, self._due = seed, group, due
        self._clusters_of = clusters_of
        self._numbers: dict[str, float] = {}
        self._histograms: dict[str, list[int]] | None = None

    def is_due(self, step: int) -> bool:
        """Whether this step is measured: the same on every rank."""
        return self._due(step)

    def numbers(self) -> dict[str, float]:
        """Of the last measured step, empty before the first; NaN where no row has a negative."""
        return self._numbers

    def histograms(self) -> dict[str, list[int]] | None:
        """Sampled rows of that step by cosine with their positive and their hardest negative."""
        return self._histograms

    def measure_pairs(
        self,
        batch: Batch,
        step: int,
        rows: Tensor,  # (n, d) unit
        columns: Tensor,  # (n, d) unit; row i's positive is column i
        scale: float,
        identities: Mapping[str, Tensor | None],  # (n,) int: equal ones are left out by the loss
    ) -> None:
        """Images against the texts of all ranks."""
        with plain_arithmetic(rows.device):
            known = {name: values for name, values in identities.items() if values is not None}
            facts = {**known, "label": batch.labels, "caption": batch.caption_ids}
            sampled = self._sample(batch, step, rows, facts)
            keys = batch.positions.to(rows.device)
            table = _table(sampled, Keyed(keys, columns.__getitem__))
            _mark(table.positive, keys, sampled.fact("position"))
            for name, values in known.items():
                equal = sampled.fact(name).unsqueeze(1) == values.to(rows.device)
                table.masked.logical_or_(equal)
            table.masked.logical_and_(~table.positive)
            self._finish(sampled, table, keys, "position", scale)

    def measure_centers(
        self,
        batch: Batch,
        step: int,
        rows: Tensor,  # (n, d) of any length
        classes: Tensor,  # (n,)
        scale: float,
        centers: Keyed,  # of classes, each once over the ranks
        bars: Tensor | None = None,  # (n,) cosines of the positives with the loss's margin
    ) -> None:
        """Embeddings against the centers that took part in the step, or a sample of very many."""
        with plain_arithmetic(rows.device):
            unit = torch.nn.functional.normalize(rows.double())
            facts = {"class": classes, "label": batch.labels}
            sampled = self._sample(batch, step, unit, facts, bars)
            own = sampled.fact("class")
            centers = self._bounded(centers, own, rows.shape[1], step)
            table = _table(sampled, centers, torch.float32)
            _mark(table.positive, centers.keys, own)
            self._finish(sampled, table, centers.keys, "class", scale)

    def measure_labels(
        self,
        batch: Batch,
        step: int,
        queries: Tensor,  # (n, d) unit
        scale: float,
        positives: tuple[Tensor, Tensor],  # of the n: offsets (n + 1,), label ids (nnz,); int64
        labels: Keyed,  # of label ids; with `drawn` one may come several times over the ranks
        *,
        drawn: Tensor | None = None,  # (n,) the label that is a query's positive; None: the nearest
        margin: float = 0.0,  # a negative should stay so far below the positive
    ) -> None:
        """Queries against labels; no label of a query is a negative of it, drawn or not."""
        with plain_arithmetic(queries.device):
            facts = {"caption": batch.caption_ids}
            if drawn is not None:
                facts |= {"class": drawn, "label": drawn}
                labels = self._distinct(labels)
            sampled = self._sample(batch, step, queries, facts)
            rows, own = self._lists(sampled, batch.positions.to(queries.device), positives)
            labels = self._bounded(labels, own, queries.shape[1], step)
            table = _table(sampled, labels)
            if drawn is None:
                _mark(table.positive, labels.keys, own, rows)
            else:
                _mark(table.positive, labels.keys, sampled.fact("class"))
                _mark(table.masked, labels.keys, own, rows)
                table.masked.logical_and_(~table.positive)
            name = "" if drawn is None else "class"
            self._finish(sampled, table, labels.keys, name, scale, margin)

    def _sample(
        self,
        batch: Batch,
        step: int,
        rows: Tensor,
        facts: Mapping[str, Tensor],
        bars: Tensor | None = None,
    ) -> Sampled:
        facts = dict(facts)
        if self._clusters_of is not None:
            clusters = self._clusters_of(batch.positions)
            none = torch.full_like(batch.positions, -1)
            facts["cluster"] = none if clusters is None else clusters
        return sample_rows(
            rows, batch.positions, facts, self._group, seed=self._seed, step=step, bars=bars
        )

    def _bounded(self, columns: Keyed, sure: Tensor, dim: int, step: int) -> Keyed:
        """All columns, or a bounded sample of very many that holds the sure ones."""
        places = choose_columns(
            columns.keys, sure, self._group, dim=dim, seed=self._seed, step=step
        )
        return Keyed(columns.keys[places], lambda part: columns.read(places[part]))

    def _distinct(self, columns: Keyed) -> Keyed:
        """Of columns with one key, the first in the order of ranks, as the loss takes it."""
        counts = gather_counts(len(columns.keys), self._group, columns.keys.device)
        everyone = gather_rows(columns.keys, counts, self._group)
        order = everyone.argsort(stable=True)
        ordered = everyone[order]
        first = torch.ones_like(everyone, dtype=torch.bool)
        first[order[1:]] = ordered[1:] != ordered[:-1]
        start = sum(counts[: own_rank(self._group)])
        own = first[start : start + len(columns.keys)] & (columns.keys >= 0)
        places = own.nonzero()[:, 0]
        places = places[columns.keys[places].argsort()]
        return Keyed(columns.keys[places], lambda part: columns.read(places[part]))

    def _lists(
        self, sampled: Sampled, positions: Tensor, lists: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:  # (w,) sampled row, (w,) one key of it
        """Keys of all sampled rows, from the ranks that hold them."""
        offsets, keys = (part.to(positions.device) for part in lists)
        at, here = find(sampled.fact("position"), positions)
        counts = offsets.diff()
        rows = at.repeat_interleave(counts)[here.repeat_interleave(counts)]
        own = torch.stack([rows, keys[here.repeat_interleave(counts)].long()], dim=1)
        lengths = gather_counts(len(own), self._group, own.device)
        everyone = gather_rows(own, lengths, self._group)
        of_rows, of_keys = everyone.T.contiguous()
        return of_rows, of_keys

    def _finish(
        self,
        sampled: Sampled,
        table: Table,
        keys: Tensor,  # (m,) of the columns
        name: str,  # of the fact that says with which column a row came; empty: unknown
        scale: float,
        margin: float = 0.0,
    ) -> None:
        """Reduce over ranks and keep the numbers."""
        clusters = sampled.facts.get("cluster")
        if clusters is not None and name and (clusters >= 0).any():
            own = clusters[sampled.chosen].unsqueeze(1)
            rows, members = ((own == clusters) & (own >= 0)).nonzero().unbind(1)
            mates = torch.zeros_like(table.positive)
            _mark(mates, keys, sampled.facts[name][members], rows)
            table = table._replace(mates=mates)
        found = reduce_columns(table, scale, self._group)
        self._numbers = {
            **_summarise(found, sampled, margin),
            **_count_distinct(sampled.facts),
        }
        if table.mates is not None:
            self._numbers["cluster_mates"] = _mate_share(found, sampled)
        self._histograms = {
            "positive": count_cosines(found.positive).tolist(),
            "hardest_negative": count_cosines(found.hardest).tolist(),
        }


def build_hardness(
    config: Config,
    epoch_samples: int,
    group: ProcessGroup | None,
    clusters_of: ClustersOf | None = None,
) -> Hardness:
    """For the steps that a run logs: every `log.every`, and its last."""

    def steps(duration: Duration) -> int:
        return duration.to_steps(config.train.global_batch_size, epoch_samples)

    every, total = steps(config.log.every), steps(config.train.duration)

    def due(step: int) -> bool:
        return (step + 1) % every == 0 or step + 1 == total

    return Hardness(config.train.seed, group, due=due, clusters_of=clusters_of)


def _table(sampled: Sampled, columns: Keyed, dtype: torch.dtype = torch.float64) -> Table:
    """Every column a negative as yet; cosines are summed in `dtype`."""
    places = torch.arange(len(columns.keys), device=columns.keys.device)
    cosines = cosines_with(sampled.vectors.to(dtype), columns.read, places)
    nowhere = torch.zeros_like(cosines, dtype=torch.bool)
    return Table(cosines, nowhere, nowhere.clone(), None)


def _mark(
    table: Tensor,  # (s, m) bool
    keys: Tensor,  # (m,) int64 distinct
    wanted: Tensor,  # (w,) int64
    rows: Tensor | None = None,  # (w,) row that wants it; None: row i wants the i-th
) -> None:
    """Set the entries where a row meets a column that it wants, if that is here."""
    rows = torch.arange(len(wanted), device=wanted.device) if rows is None else rows
    order = keys.argsort()
    at, here = find(keys[order], wanted)
    table[rows[here], order[at[here]]] = True


def _summarise(found: RowStatistics, sampled: Sampled, margin: float) -> dict[str, float]:
    """Means and shares over the rows that have a positive and a negative."""
    usable = _usable(found)
    bars = torch.where(sampled.bars.isnan(), found.positive - margin, sampled.bars)
    negatives, masked = found.num_negatives.sum(), found.num_masked.sum()
    means = {
        "positive_cosine": found.positive,
        "hardest_negative": found.hardest,
        "top10_negatives": found.top,
        "hardness_gap": found.positive - found.hardest,
        "margin_violations": (found.hardest > bars).double(),
        "closer_than_positive": (found.hardest > found.positive).double(),
        "effective_negatives": found.effective,
        "num_negatives": found.num_negatives,
    }
    suspected = found.num_suspected[usable].sum() / found.num_negatives[usable].sum()
    return {
        "hardness_rows": int(usable.sum()),
        **{name: float(values[usable].mean()) for name, values in means.items()},
        "masked_share": float(masked / (masked + negatives)),
        "suspected_false_negatives": float(suspected),
    }


def _usable(found: RowStatistics) -> Tensor:  # (s,) bool
    return found.positive.isfinite() & found.hardest.isfinite()


def _mate_share(found: RowStatistics, sampled: Sampled) -> float:
    """Share of the hardest negatives that are cluster mates, of rows that are in a cluster."""
    usable = _usable(found) & (sampled.fact("cluster") >= 0)
    return float((found.nearest_mate >= found.hardest)[usable].double().mean())


def _count_distinct(facts: Mapping[str, Tensor]) -> dict[str, int]:
    """Distinct labels and captions of the global batch, where it has some."""
    counts = {}
    if "label" in facts and (facts["label"] >= 0).any():
        labels = facts["label"]
        counts["distinct_labels"] = len(torch.unique(labels[labels >= 0]))
    if "caption" in facts:
        counts["distinct_captions"] = len(torch.unique(facts["caption"]))
    return counts
