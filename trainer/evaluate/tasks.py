"""The model over an evaluation set, then the tasks that were asked for."""

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import ProcessGroup

from data.errors import DataError
from data.loader import EvalBatch
from trainer.collectives import sum_over_ranks
from trainer.config import ConfigError, EvalConfig
from trainer.evaluate.classes import ClassNames, load_class_names, merge_class_names
from trainer.evaluate.image_tasks import (
    evaluate_all_pairs,
    evaluate_identification,
    evaluate_ijb,
    evaluate_recall,
    evaluate_verification,
)
from trainer.evaluate.retrieval import retrieval
from trainer.evaluate.roc import Curve
from trainer.evaluate.subject import Subject, Tables
from trainer.evaluate.towers import Embedded, Tokenizer, Towers
from trainer.evaluate.zero_shot import zero_shot
from trainer.ranks import Ranks


def evaluate(
    model: nn.Module,
    batches: Iterable[EvalBatch],  # this rank's, perhaps none
    tokenizer: Tokenizer | None,  # None: no task is about texts
    config: EvalConfig,
    ranks: Ranks,
    *,
    autocast: torch.dtype | None = None,  # bfloat16, float16; None: float32
    tables: Tables | None = None,
    curves: dict[str, Curve] | None = None,  # gets the ROC of each task that has one
) -> dict[str, float]:
    """Plain numbers of `config.tasks` over all samples of all ranks; the same dict on every rank.

    Collective: every rank calls it, and gets what one process would that saw every sample. The
    model is in evaluation mode meanwhile. Raises ConfigError for templates or classes that do not
    fit, DataError when there is nothing to evaluate.
    """
    towers = Towers(
        model,
        ranks,
        batch_size=config.batch_size,
        autocast=autocast,
        flip=config.flip,
        quarter_turns=config.quarter_turns,
    )
    was_training = model.training
    model.eval()
    try:
        embedded = towers.embed(batches)
        counts = torch.tensor([len(embedded.ids), embedded.num_bad], device=ranks.device)
        num_images, num_bad = sum_over_ranks(counts, ranks.group).tolist()
        if num_images == 0:
            raise DataError("there is no sample to evaluate")
        results: dict[str, float] = {"num_images": num_images, "num_bad": num_bad}
        subject = Subject(
            towers=towers,
            embedded=embedded,
            tokenizer=tokenizer,
            config=config,
            tables=tables or Tables(),
            group=ranks.group,
            curves={} if curves is None else curves,
        )
        for task in config.tasks:
            results |= TASKS[task](subject)
    finally:
        model.train(was_training)
    return results


def evaluate_retrieval(subject: Subject) -> dict[str, float]:
    """Captions against images and images against captions, all of the set."""
    embedded = subject.embedded
    return retrieval(
        embedded.images,
        subject.towers.embed_texts(embedded.tokens),
        embedded.ids,
        embedded.owners,
        subject.group,
        caption_ids=embedded.caption_ids,
    )


def evaluate_zero_shot(subject: Subject) -> dict[str, float]:
    """Images against class names in prompts."""
    embedded, config = subject.embedded, subject.config
    if subject.tokenizer is None:
        raise ConfigError("eval.tasks: zero_shot needs a model with a text tower")
    classes = find_classes(config, embedded, subject.group)
    embeddings, labels = subject.towers.embed_classes(classes, config.templates, subject.tokenizer)
    return zero_shot(embedded.images, embedded.labels, embeddings, labels, subject.group)


TEXT_TASKS = {"retrieval": evaluate_retrieval, "zero_shot": evaluate_zero_shot}
IMAGE_TASKS = {
    "recall": evaluate_recall,
    "verification": evaluate_verification,
    "identification": evaluate_identification,
    "all_pairs": evaluate_all_pairs,
    "ijb": evaluate_ijb,
}
TASKS = TEXT_TASKS | IMAGE_TASKS


def find_classes(
    config: EvalConfig, embedded: Embedded, group: ProcessGroup | None
) -> Sequence[ClassNames]:
    """Those of `eval.classes`; without it the set's labels, called by their distinct captions."""
    if config.classes:
        return load_class_names(config.classes)
    parts: list[frozenset[tuple[int, str]]] = [embedded.label_names]
    if group is not None:
        parts *= group.size()
        dist.all_gather_object(parts, embedded.label_names, group=group)
    classes = merge_class_names(sorted(frozenset().union(*parts)))
    if not classes:
        raise ConfigError(
            "eval.tasks: zero_shot needs labels, and no sample has one; "
            "set data.label_key to the ending of the label member"
        )
    return classes
