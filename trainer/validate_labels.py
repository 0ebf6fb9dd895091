"""Evaluation of texts against labels: shards with lists of labels, the label table, a filter list.

What `trainer/validate.py` is for the other tasks.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import torch
from torch import Tensor, nn

from data.errors import DataError
from data.filters import load_filter
from data.index import Index, build_index
from data.label_lists import LabelLists, index_label_lists, load_label_lists
from data.label_table import LabelTable, find_label_table, read_label_table
from data.loader import EvalBatch, iter_eval_batches
from data.rows import Keys
from data.shards import expand_shards, local_path
from trainer.centers.parts import Part
from trainer.config import Config, ConfigError
from trainer.evaluate.towers import Towers
from trainer.evaluate.xmc import (
    LabelFacts,
    RowsOfLabels,
    RowsOfTexts,
    embed_queries,
    evaluate_labels,
)
from trainer.evaluate.xmc_file import check_place
from trainer.evaluate.xmc_neighbours import TrainingTexts
from trainer.models.texts import TextModel
from trainer.models.texts.label_texts import tokenize_labels
from trainer.ranks import Ranks
from trainer.samples import Progress, index_shards

FILTER = "filter_labels_test.txt"  # as the extreme classification repository calls it
_AT_ONCE = 4096  # label texts that are embedded together, at most

Classifiers = Callable[[Part], Tensor]
"""(m, d) unit rows of this rank's part of the labels, as they are now."""


@dataclass(frozen=True)
class LabelSet:
    """Queries with their labels, and what is known of the labels."""

    index: Index
    facts: LabelFacts


def open_label_set(
    config: Config, shards: str | Sequence[str], progress: Progress | None = None
) -> LabelSet:
    """Index what is new and read every table, so that what does not fit is told before anything
    is embedded: ConfigError and DataError name it.
    """
    if others := [task for task in config.eval_tasks if task != "xmc"]:
        raise ConfigError(
            f"eval.tasks: {others[0]} is not for texts against labels (loss.name = "
            f"{config.loss.name!r}): choose xmc"
        )
    if config.eval.predictions:
        check_place(config.eval.predictions)
    names = expand_shards(shards)
    keys = Keys("", config.data.caption_key, config.data.label_key)
    required = [keys.caption_ending, keys.labels]
    index = build_index(names, required=required, keys=keys, progress=progress)
    table, lists = _read_table(config, names), index_label_lists(index)
    table.check_ids(lists.num_labels, names[0])
    if not len(lists.ids):
        raise DataError(f"xmc: none of the {len(index):,} samples of {names[0]} has a label")
    return LabelSet(index, LabelFacts(table, lists, _read_filter(config, names, index)))


def _read_table(config: Config, names: Sequence[str]) -> LabelTable:
    """The training set's. Its shards may be elsewhere; then it lies beside those evaluated too."""
    try:
        sources = config.data.all_sources()
        trained = [name for source in sources for name in expand_shards(source.shards)]
    except DataError:
        trained = []
    return read_label_table(find_label_table([*trained, *names], config.labels.table))


def _read_filter(config: Config, names: Sequence[str], index: Index) -> LabelLists:
    path = config.labels.filter
    if not path:
        local = [found for found in map(local_path, names) if found is not None]
        folders = dict.fromkeys(os.path.dirname(found) for found in local)
        beside = [str(file) for folder in folders if (file := Path(folder, FILTER)).is_file()]
        if len(beside) > 1:
            raise ConfigError(f"{' and '.join(beside)}: name one with labels.filter")
        path = beside[0] if beside else ""
    if path:
        return load_filter(path, index)
    return LabelLists(np.zeros(len(index) + 1, np.int64), np.zeros(0, np.int32))


@dataclass(frozen=True)
class LabelValidation:
    """Queries and labels, ready to be embedded by any version of one model."""

    config: Config
    ranks: Ranks
    content: LabelSet
    model: TextModel  # for its tokenizer; the weights used are those of the module called
    part: Part  # of all labels, this rank's
    label_rows: RowsOfLabels
    autocast: torch.dtype | None
    training_texts: RowsOfTexts | None

    @classmethod
    def build(
        cls,
        config: Config,
        model: TextModel,
        ranks: Ranks,
        shards: str | Sequence[str],
        autocast: torch.dtype | None,
        classifiers: Classifiers | None = None,
    ) -> Self:
        """Open the set in `shards`; `classifiers` are asked at each call, without them texts."""
        content = open_label_set(config, shards)
        table = content.facts.table
        part = Part.of_rank(table.num_labels, ranks.rank, ranks.world_size)
        rows = _embed(table, model, part) if classifiers is None else _take(classifiers, part)
        voters = _Voters.open(config, model, ranks) if config.eval.neighbours.count else None
        return cls(config, ranks, content, model, part, rows, autocast, voters)

    def __call__(self, module: nn.Module) -> dict[str, float]:
        """The numbers of task xmc; collective, the same on every rank."""
        config, ranks = self.config, self.ranks
        batches = _batches(self.content.index, config, self.model, ranks)
        return evaluate_labels(
            module,
            batches,
            self.content.index,
            self.content.facts,
            self.part.start,
            self.label_rows,
            config,
            ranks,
            autocast=self.autocast,
            training_texts=self.training_texts,
        )


def _batches(index: Index, config: Config, model: TextModel, ranks: Ranks) -> Iterator[EvalBatch]:
    return iter_eval_batches(
        index,
        config.data,
        image_transform=None,
        tokenizer_spec=model.tokenizer_spec,
        batch_size=config.eval.batch_size,
        rank=ranks.rank,
        world_size=ranks.world_size,
    )


@dataclass(frozen=True)
class _Voters:
    """All training texts, embedded anew at each call."""

    config: Config
    model: TextModel
    ranks: Ranks
    indexes: tuple[Index, ...]
    lists: LabelLists

    @classmethod
    def open(cls, config: Config, model: TextModel, ranks: Ranks) -> Self:
        """ConfigError where no training shards are named, DataError where they cannot be read."""
        sources = config.data.all_sources()
        if not sources:
            raise ConfigError(
                f"eval.neighbours.count = {config.eval.neighbours.count}: training texts vote, so "
                "name their shards: --data.shards=train-{000..007}.tar"
            )
        indexes = tuple(index_shards(source.shards, config) for source in sources)
        return cls(config, model, ranks, indexes, load_label_lists(indexes))

    def __call__(self, towers: Towers) -> TrainingTexts:
        parts, ids, first = [], [], 0
        for index in self.indexes:
            found = embed_queries(towers, _batches(index, self.config, self.model, self.ranks))
            parts.append(found.rows)
            ids.append(found.ids + first)
            first += len(index)
        device = self.ranks.device
        return TrainingTexts(torch.cat(parts), torch.cat(ids).to(device), self.lists)


def _embed(table: LabelTable, model: TextModel, part: Part) -> RowsOfLabels:
    tokens = tokenize_labels(table, model.tokenizer_spec, part.start, part.stop)

    def rows(towers: Towers) -> Tensor:
        return towers.embed_labels(tokens.rows.split(_AT_ONCE) if len(tokens.rows) else ())

    return rows


def _take(classifiers: Classifiers, part: Part) -> RowsOfLabels:
    def rows(_towers: Towers) -> Tensor:
        found = classifiers(part)
        if len(found) != len(part):
            raise ConfigError(
                f"there are classifiers of {len(found):,} labels on this rank, and the label table "
                f"has {len(part):,} for it: set labels.table to the one it was trained with"
            )
        return found

    return rows
