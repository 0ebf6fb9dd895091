"""Evaluation of shards and `.bin` sets with a model: what `nsphere eval` and training share."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn

from data.augment import ImageTransform
from data.bins import BIN_ENDING, BinSet, iter_bin_batches, load_bin
from data.index import Index, build_index
from data.loader import EvalBatch, iter_eval_batches
from data.rows import Keys
from data.shards import expand_shards
from data.text import Tokenizer, build_tokenizer
from trainer.centers.label_rows import read_label_rows
from trainer.config import Config, ConfigError, EvalConfig
from trainer.evaluate import TEXT_TASKS, evaluate
from trainer.evaluate.image_tasks import load_tables
from trainer.evaluate.roc import Curve, write_curves
from trainer.evaluate.subject import Tables
from trainer.evaluate.verification import Pairs
from trainer.export import load_faces, load_towers
from trainer.models.texts import TextModel
from trainer.models.texts.build import restore_text_model
from trainer.objectives import Model, Objective
from trainer.objectives.labels import LabelObjective
from trainer.precision import autocast_dtype
from trainer.ranks import Ranks
from trainer.samples import Progress
from trainer.validate_labels import Classifiers, LabelValidation, open_label_set

Evaluation = Callable[[nn.Module], dict[str, float]]
"""The model as it is now -> its numbers; collective, the same on every rank."""


@dataclass(frozen=True)
class EvalSet:
    """Samples that are evaluated together, what is asked of them, and the tables for it."""

    name: str
    """Prefix of its numbers; empty: none."""
    config: EvalConfig
    """With the tasks resolved."""
    tables: Tables
    content: Index | BinSet


def open_sets(
    config: Config, shards: str | Sequence[str], progress: Progress | None = None
) -> list[EvalSet]:
    """The sets in `shards`: all tar shards as one, and each `.bin` file.

    Indexes what is new and looks every table up, so that whatever does not fit is told before
    anything is embedded: ConfigError and DataError name it.
    """
    names = expand_shards(shards)
    tars = [name for name in names if not name.endswith(BIN_ENDING)]
    bins = [load_bin(name) for name in names if name.endswith(BIN_ENDING)]
    tasks = _tasks_of_shards(config, with_bins=bool(bins))
    sets = []
    if tars and tasks:
        asked = config.eval.model_copy(update={"tasks": tasks})
        index = _index(tars, config, asked, progress)
        sets.append(EvalSet("", asked, load_tables(asked, index), index))
    for content in bins:
        pairs = Pairs(content.pairs, content.same, str(content.path))
        pairs.check()
        asked = config.eval.model_copy(update={"tasks": ("verification",)})
        name = content.path.stem if len(bins) > 1 or sets else ""
        sets.append(EvalSet(name, asked, Tables(pairs=pairs), content))
    return sets


def check_sets(
    config: Config, shards: str | Sequence[str], progress: Progress | None = None
) -> None:
    """Index what is new and raise ConfigError or DataError for whatever does not fit."""
    if config.has_labels:
        open_label_set(config, shards, progress)
    else:
        open_sets(config, shards, progress)


def _tasks_of_shards(config: Config, *, with_bins: bool) -> tuple[str, ...]:
    """What tar shards are asked; `.bin` sets are only ever verified, with their own pairs."""
    tasks: tuple[str, ...] = config.eval_tasks
    if "xmc" in tasks:
        raise ConfigError(
            "eval.tasks: xmc is about texts with labels, and this run's loss.name = "
            f"{config.loss.name!r} has none"
        )
    if texts := [task for task in tasks if task in TEXT_TASKS and config.has_centers]:
        raise ConfigError(
            f"eval.tasks: {texts[0]} needs texts, and loss.name = {config.loss.name!r} trains a "
            "backbone for images alone: choose recall, verification, identification, all_pairs"
        )
    if not with_bins:
        return tasks
    if config.eval.tasks and "verification" not in tasks:
        raise ConfigError(
            f"eval.tasks = {list(tasks)}: a .bin set is only verified: --task verification"
        )
    others = tuple(task for task in tasks if task != "verification" or config.eval.pairs)
    return others or tasks


def _index(
    shards: Sequence[str], config: Config, asked: EvalConfig, progress: Progress | None
) -> Index:
    """Samples with an image, and with a caption if a task reads captions."""
    data = config.data
    caption_key = "" if config.has_centers else data.caption_key
    keys = Keys(data.image_key, caption_key, data.label_key)
    required = [keys.image, *([keys.caption_ending] if reads_captions(asked) else [])]
    return build_index(shards, required=required, keys=keys, progress=progress)


def reads_captions(config: EvalConfig) -> bool:
    """True where a task is about the captions of the samples."""
    return "retrieval" in config.tasks or ("zero_shot" in config.tasks and not config.classes)


def load_model(
    weights: Mapping[str, Tensor], config: Config, device: torch.device | str = "cpu"
) -> Model:
    """The model of a configuration with these weights, in evaluation mode.

    Raises ConfigError naming the first keys that do not fit the configuration.
    """
    if config.has_labels:
        return restore_text_model(weights, config, device=device)
    if config.has_centers:
        return load_faces(weights, config.model, device=device)
    return load_towers(weights, config.model, loss_name=config.loss.name, device=device)


def build_validation(
    config: Config,
    model: Model,
    ranks: Ranks,
    *,
    objective: Objective | None = None,  # that trains
    checkpoint: Path | None = None,  # that is evaluated
) -> Evaluation:
    """The evaluation of `data.val_shards`; rows of labels that no tower embeds come from either."""
    shards = config.data.val_shards
    if not isinstance(model, TextModel):
        return Validation.build(config, model, ranks, shards)
    classifiers: Classifiers | None = None
    if isinstance(objective, LabelObjective) and objective.rows is not None:
        rows = objective.rows
        classifiers = lambda _part: rows.unit_rows()  # noqa: E731
    elif checkpoint is not None and config.labels.rows == "classifiers":
        classifiers = partial(read_label_rows, checkpoint)
    autocast = autocast_dtype(config.train.precision, ranks.device)
    return LabelValidation.build(config, model, ranks, shards, autocast, classifiers)


@dataclass(frozen=True)
class Validation:
    """Evaluation sets, ready to be embedded by any version of one model."""

    config: Config
    ranks: Ranks
    sets: tuple[EvalSet, ...]
    transform: ImageTransform
    model: Model  # for its tokenizer; the weights used are those of the module called
    tokenizer: Tokenizer | None

    @classmethod
    def build(cls, config: Config, model: Model, ranks: Ranks, shards: str | Sequence[str]) -> Self:
        """Open the sets in `shards`, with the transform and tokenizer that `model` needs."""
        sets = tuple(open_sets(config, shards))
        height, width = model.image_size
        if config.eval.quarter_turns and height != width:
            raise ConfigError(
                f"eval.quarter_turns turns square images, and this model takes {height} x {width}"
            )
        about_texts = any(task in TEXT_TASKS for one in sets for task in one.config.tasks)
        spec = model.tokenizer_spec if about_texts else None
        return cls(
            config=config,
            ranks=ranks,
            sets=sets,
            transform=ImageTransform(model.image_size, None, resize_mode=model.resize_mode),
            model=model,
            tokenizer=build_tokenizer(spec) if spec is not None else None,
        )

    def __call__(self, module: nn.Module) -> dict[str, float]:
        """The numbers of every set's tasks; collective, the same on every rank.

        The first rank writes the curves to `eval.roc`.
        """
        results: dict[str, float] = {"flip": int(self.config.eval.flip)}
        if self.config.eval.quarter_turns:
            results["quarter_turns"] = 1
        curves: dict[str, Curve] = {}
        for one in self.sets:
            of_set: dict[str, Curve] = {}
            numbers = evaluate(
                module,
                self._batches(one),
                self.tokenizer,
                one.config,
                self.ranks,
                autocast=autocast_dtype(self.config.train.precision, self.ranks.device),
                tables=one.tables,
                curves=of_set,
            )
            results |= {_prefixed(name, one.name): value for name, value in numbers.items()}
            curves |= {_prefixed(name, one.name): curve for name, curve in of_set.items()}
        if self.config.eval.roc and self.ranks.is_first:
            write_curves(Path(self.config.eval.roc), curves)
        return results

    def _batches(self, one: EvalSet) -> Iterator[EvalBatch]:
        size, rank, world_size = one.config.batch_size, self.ranks.rank, self.ranks.world_size
        if isinstance(one.content, BinSet):
            return iter_bin_batches(
                one.content,
                image_transform=self.transform,
                batch_size=size,
                rank=rank,
                world_size=world_size,
                max_pixels=self.config.data.max_pixels,
            )
        return iter_eval_batches(
            one.content,
            self.config.data,
            image_transform=self.transform,
            tokenizer_spec=self.model.tokenizer_spec if reads_captions(one.config) else None,
            batch_size=size,
            rank=rank,
            world_size=world_size,
        )


def _prefixed(name: str, prefix: str) -> str:
    """Counts keep their `num_` in front, by which they are known."""
    if not prefix:
        return name
    if name.startswith("num_"):
        return f"num_{prefix}_{name.removeprefix('num_')}"
    return f"{prefix}_{name}"
