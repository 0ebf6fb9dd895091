"""Texts against their labels: label texts that a tower embeds, or a classifier row for each label.

In a step a query meets the labels of the global batch, or all there are. Which these are, which
positive is drawn, and which label of an explicit negative, are functions of the seed and of places
in the run; so nothing depends on how many ranks there are.
"""

import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data.label_lists import LabelLists
from data.loader import Batch
from data.order import derive_key
from data.planned_order import PlannedOrder
from trainer.centers.files import load_state, state_files
from trainer.centers.label_rows import LabelRows
from trainer.centers.parts import Part
from trainer.collectives import gather_counts, gather_rows, sum_over_ranks
from trainer.config import Config, ConfigError, LossConfig
from trainer.dropout import UNDROPPED, row_keys
from trainer.engine import Engine
from trainer.hardness import Hardness, Keyed
from trainer.losses import (
    Positives,
    decoupled_loss,
    info_nce_loss,
    one_vs_all_loss,
    soft_topk_loss,
    topk_hinge_loss,
)
from trainer.models.texts import TextModel
from trainer.models.texts.label_texts import LabelTokens
from trainer.objectives.objective import Outputs
from trainer.ranks import Ranks

LABELS = "labels.json"  # in a checkpoint
MARGIN, HARDEST = 0.3, 10  # of topk_hinge, as NGAME publishes it
_DRAW, _DRAW_NEGATIVE = 22, 23  # what a key is for
_OF_LABELS = 1 << 62  # beyond any position of a sample: keys of labels' dropout


class LabelData(NamedTuple):
    """What is known of a run's labels and of who has them."""

    lists: LabelLists  # by sample id
    part: Part  # of all labels, this rank's
    digest: str  # of all labels' texts
    planned: PlannedOrder | None = None  # whose plans may hold explicit negatives and weights


class Asked(NamedTuple):
    """What a batch asks of the labels."""

    positives: Positives  # of this rank's queries
    drawn: Tensor | None  # (n,) the one that pulls, -1: none; None: all of them
    label_ids: Tensor  # (m,) int64 of the label texts that this rank embeds, rising


class LabelObjective:
    """Queries of this rank against labels of all ranks.

    Label texts are inputs beside the queries, and averaged with the towers. Classifiers are outside
    the engine: their gradient is never averaged over ranks.
    """

    def __init__(
        self,
        config: Config,
        model: TextModel,
        engine: Engine,
        ranks: Ranks,
        data: LabelData,
        side: LabelTokens | LabelRows,  # label texts, of all labels that may come, or classifiers
        hardness: Hardness,
    ) -> None:
        self._config, self._model, self._engine, self._ranks = config.loss, model, engine, ranks
        self._lists, self._part, self._planned = data.lists, data.part, data.planned
        self._hardness = hardness
        self._facts: dict[str, Any] = {"num_labels": data.part.num_classes, "texts": data.digest}
        self._tokens = side if isinstance(side, LabelTokens) else None
        self.rows = side if isinstance(side, LabelRows) else None
        self._over_all = config.labels.over == "all"
        self._label_dropout = config.model.label_dropout
        self._seed, self._batch_size = config.train.seed, config.train.global_batch_size
        self._explicit = config.negatives.explicit
        self._is_weighted = bool(config.negatives.weights)
        self._own_labels = torch.arange(data.part.start, data.part.stop)
        self._squared_norm, self._unlabelled = 0.0, 0

    def inputs(self, batch: Batch) -> tuple[Tensor, ...]:
        if self._tokens is None:
            return (batch.texts,)
        ids = self._ask(batch).label_ids
        return batch.texts, self._tokens.of(ids), self._label_keys(batch, ids)

    def most_rows(self, num_samples: int) -> int:
        """Label texts are inputs too: a rank's part of all, or those that its samples bring."""
        if self._tokens is None:
            return num_samples
        if not self._over_all:
            brought = num_samples * (1 + self._explicit)
            return max(num_samples, min(brought, self._part.num_classes))
        world_size = self._ranks.world_size
        return max(num_samples, -(-self._part.num_classes // world_size))

    def loss(self, outputs: Outputs, batch: Batch, step: int) -> Tensor:
        asked = self._ask(batch)
        self._unlabelled = int((asked.positives.offsets.diff() == 0).sum())
        queries, *rest = outputs
        if self.rows is None:
            labels, ids = rest.pop(0), asked.label_ids
        else:
            taken = self.rows.take(self._touched(asked.positives))
            labels, ids = taken.unit, taken.ids
        scale, bias = rest[0], rest[1] if rest[1:] else None
        ids = ids.to(queries.device)
        if self._hardness.is_due(step):
            self._measure(batch, step, queries, scale, asked, Keyed(ids, labels.__getitem__))
        group, parts, weights = self._ranks.group, self.rows is not None, self._row_weights(batch)
        if bias is not None:
            return one_vs_all_loss(
                queries,
                labels,
                scale,
                bias,
                asked.positives,
                ids,
                group,
                row_weights=weights,
                labels_are_parts=parts,
            )
        if self._config.name == "topk_hinge":  # its margin is one of cosines
            scale = torch.ones_like(scale)
        return _build_loss(self._config)(
            queries,
            labels,
            scale,
            asked.positives,
            ids,
            group,
            drawn=asked.drawn,
            row_weights=weights,
            labels_are_parts=parts,
        )

    def after_step(self, learning_rate: float, *, applied: bool) -> None:
        """Keep the scale within its limits; classifiers move with the towers or not at all."""
        if applied:
            self._engine.clamp(self._model.log_scale, *self._model.log_scale_limits)
        if self.rows is None:
            return
        if applied:
            self._squared_norm = self.rows.step(learning_rate)
        else:
            self.rows.discard()

    def numbers(self, outputs: Outputs) -> dict[str, float]:
        rest = outputs[1 if self.rows is not None else 2 :]
        numbers = {"scale": float(rest[0])} | ({"bias": float(rest[1])} if rest[1:] else {})
        sums = torch.tensor([self._squared_norm, self._unlabelled, len(outputs[0])]).double()
        squared, unlabelled, count = sum_over_ranks(
            sums.to(self._ranks.device), self._ranks.group
        ).tolist()
        if self.rows is not None:
            numbers["centers_grad_norm"] = math.sqrt(squared)
        return {**numbers, "unlabelled": unlabelled / count, **self._hardness.numbers()}

    def histograms(self, outputs: Outputs, batch: Batch) -> dict[str, list[int]] | None:  # noqa: ARG002
        """Of the sampled rows."""
        return self._hardness.histograms()

    def files(self) -> dict[str, Any]:
        """The towers hold everything but classifiers, and which labels they are of."""
        files = {} if self.rows is None else state_files(self.rows, None)
        return files | ({LABELS: self._facts} if self._ranks.is_first else {})

    def load(self, checkpoint: Path) -> None:
        """Classifiers, where there are some. Raises ConfigError where labels had other texts."""
        stored = json.loads((checkpoint / LABELS).read_text())
        if stored != self._facts:
            raise ConfigError(
                f"{checkpoint} was trained on another label table ({stored['num_labels']:,} labels,"
                f" this one has {self._part.num_classes:,}; texts {stored['texts'][:8]},"
                f" {self._facts['texts'][:8]}): set labels.table as it was"
            )
        if self.rows is not None:
            load_state(self.rows, checkpoint)

    def _ask(self, batch: Batch) -> Asked:
        lists = self._lists.of(batch.ids.numpy())
        ids = torch.from_numpy(lists.ids.astype(np.int64))
        positives = Positives(torch.from_numpy(lists.offsets), ids)
        if self._over_all or self.rows is not None:
            return Asked(positives, None, self._own_labels)
        drawn = _draw(lists, derive_key(self._seed, _DRAW, batch.positions.numpy()))
        labels = torch.cat([drawn, self._draw_negatives(batch)])
        return Asked(positives, drawn, labels[labels >= 0].unique())

    def _draw_negatives(self, batch: Batch) -> Tensor:  # (s,)
        """A label of each explicit negative that the batch's plan names.

        Every query of the global batch meets it; to one that has the label it is a positive that
        was not drawn, and masked.
        """
        if self._planned is None or not self._explicit:
            return torch.zeros(0, dtype=torch.int64)
        positions = batch.positions.numpy()
        samples = self._planned.negatives_of(positions)[:, : self._explicit]
        rows, turns = np.nonzero(samples >= 0)
        keys = derive_key(self._seed, _DRAW_NEGATIVE, positions[rows], turns)
        return _draw(self._lists.of(samples[rows, turns]), keys)

    def _row_weights(self, batch: Batch) -> Tensor | None:  # (n,)
        """By the plans of the batch; all ranks have some or none, whatever their rows are of."""
        if self._planned is None or not self._is_weighted:
            return None
        return torch.from_numpy(self._planned.weights_of(batch.positions.numpy()))

    def _label_keys(self, batch: Batch, ids: Tensor) -> Tensor:  # (m,) -> (m,)
        """Keys of dropout: by step and label, so that any rank would draw the same masks."""
        if not self._label_dropout:
            return torch.full_like(ids, UNDROPPED)
        step = int(batch.positions[0]) // self._batch_size
        return row_keys(self._seed, ids + (step * self._part.num_classes + _OF_LABELS))

    def _touched(self, positives: Positives) -> Tensor | None:
        """Labels of this rank's part that any query of the global batch has; None: all labels."""
        if self._over_all:
            return None
        group, own = self._ranks.group, positives.labels.unique().to(self._ranks.device)
        everyone = gather_rows(own, gather_counts(len(own), group, own.device), group).unique()
        return everyone[(everyone >= self._part.start) & (everyone < self._part.stop)]

    def _measure(
        self,
        batch: Batch,
        step: int,
        queries: Tensor,
        scale: Tensor,
        asked: Asked,
        labels: Keyed,
    ) -> None:
        positives = asked.positives
        self._hardness.measure_labels(
            batch,
            step,
            queries,
            float(scale.detach()),
            (positives.offsets, positives.labels),
            labels,
            drawn=None if asked.drawn is None else asked.drawn.to(queries.device),
            margin=_margin(self._config) if self._config.name == "topk_hinge" else 0.0,
        )


def _draw(lists: LabelLists, keys: NDArray[np.uint64]) -> Tensor:  # (n,), (n,) -> (n,)
    """A label of each row by its key, -1 where it has none."""
    counts = lists.counts
    turns = (keys % np.maximum(counts, 1).astype(np.uint64)).astype(np.int64)
    drawn = np.full(len(counts), -1, np.int64)
    some = counts > 0
    drawn[some] = lists.ids[lists.offsets[:-1][some] + turns[some]]
    return torch.from_numpy(drawn)


def _margin(config: LossConfig) -> float:
    return MARGIN if config.margin is None else config.margin


def _build_loss(config: LossConfig) -> Callable[..., Tensor]:
    """A loss of `trainer/losses` with the options of its own."""
    if config.name == "soft_topk":
        return partial(soft_topk_loss, k=config.topk, alpha=config.topk_alpha)
    if config.name == "topk_hinge":
        return partial(
            topk_hinge_loss,
            margin=_margin(config),
            k=config.topk or HARDEST,
            softmax_temperature=config.topk_temperature or None,
        )
    return {"info_nce": info_nce_loss, "decoupled": decoupled_loss}[config.name]
