"""From `[labels]` and the data to a LabelObjective: lists, table, tokens or classifier rows."""

import hashlib
from pathlib import Path

import torch
from torch import Tensor

from data.dataset import SampleSet
from data.errors import DataError
from data.label_lists import LabelLists, load_label_lists
from data.label_table import LabelTable, find_label_table, read_label_table
from data.shards import expand_shards
from trainer.centers.label_rows import LabelRows, read_label_rows
from trainer.centers.parts import Part
from trainer.checkpoint import (
    CheckpointError,
    find_checkpoint,
    load_checkpoint_config,
    load_weights,
)
from trainer.config import Config, ConfigError
from trainer.engine import Engine
from trainer.hardness import Hardness
from trainer.models.texts import TextModel
from trainer.models.texts.build import restore_text_model
from trainer.models.texts.label_texts import LabelTokens, embed_labels, tokenize_labels
from trainer.objectives.labels import LabelData, LabelObjective
from trainer.ranks import Ranks


def build_label_objective(
    config: Config,
    model: TextModel,
    engine: Engine,
    samples: SampleSet,
    ranks: Ranks,
    hardness: Hardness,
    *,
    draw: bool,  # False: classifiers come from a checkpoint
) -> LabelObjective:
    """Raises DataError for data without labels, a label without text, and ConfigError for options
    that do not fit one another, each on every rank.
    """
    lists, table = load_labels(config, samples)
    part = Part.of_rank(table.num_labels, ranks.rank, ranks.world_size)
    side = _build_side(config, model, table, part, ranks, draw=draw)
    data = LabelData(lists, part, _digest(table), samples.planned)
    return LabelObjective(config, model, engine, ranks, data, side, hardness)


def load_labels(config: Config, samples: SampleSet) -> tuple[LabelLists, LabelTable]:
    """Labels of each sample, and the table of all. Raises DataError where they do not fit."""
    lists, table = load_label_lists(samples.indexes), load_label_table(config)
    table.check_ids(lists.num_labels, "the training data")
    if not len(lists.ids):
        raise DataError(f"none of {lists.num_rows:,} training samples has a label")
    return lists, table


def load_label_table(config: Config) -> LabelTable:
    """The table that `labels.table` names, or the one beside the training shards."""
    urls = [url for source in config.data.all_sources() for url in expand_shards(source.shards)]
    return read_label_table(find_label_table(urls, config.labels.table))


def _digest(table: LabelTable) -> str:
    """Of all texts in their order."""
    digest = hashlib.blake2b(digest_size=16)
    for text in table.texts_of():
        digest.update(text.encode() + b"\0")
    return digest.hexdigest()


def _build_side(
    config: Config,
    model: TextModel,
    table: LabelTable,
    part: Part,
    ranks: Ranks,
    *,
    draw: bool,
) -> LabelTokens | LabelRows:
    if config.labels.rows == "texts":
        if config.labels.init:
            raise ConfigError(
                'labels.init gives classifiers their start, and labels.rows = "texts": a tower'
                " starts from model.pretrained"
            )
        whole = config.labels.over == "batch"
        first, stop = (0, table.num_labels) if whole else (part.start, part.stop)
        return tokenize_labels(table, model.tokenizer_spec, first, stop)
    rows = LabelRows(
        table.num_labels,
        model.embed_dim,
        ranks.group,
        config=config.centers,
        seed=config.train.seed,
        device=ranks.device,
        draw=draw and not config.labels.init,
    )
    if draw and config.labels.init:
        rows.start_from(_start_rows(config.labels.init, table, part, model.embed_dim, ranks))
    return rows


def _start_rows(source: str, table: LabelTable, part: Part, dim: int, ranks: Ranks) -> Tensor:
    """(m, d) unit rows of this part's labels, as the run `source` embeds or has learnt them."""
    try:
        checkpoint = find_checkpoint(Path(source))
        there = load_checkpoint_config(checkpoint)
        if not there.has_labels:
            raise ConfigError(f"{checkpoint} was trained with loss.name = {there.loss.name!r}")
        if there.labels.rows == "classifiers":
            rows = read_label_rows(checkpoint, part)
        else:
            weights = load_weights(checkpoint, ema=True)
            model = restore_text_model(weights, there, device=ranks.device)
            tokens = tokenize_labels(table, model.tokenizer_spec, part.start, part.stop)
            rows = embed_labels(model, tokens)
    except (CheckpointError, ConfigError) as error:
        raise ConfigError(f"labels.init = {source!r}: {error}") from None
    if rows.shape[1] != dim:
        raise ConfigError(
            f"labels.init = {source!r}: its rows have {rows.shape[1]} columns, this model's {dim}:"
            f" set model.embedding_dim = {rows.shape[1]}"
        )
    return rows.to(torch.float32)
