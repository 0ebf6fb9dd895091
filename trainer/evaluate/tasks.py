"""The towers over an evaluation set, then the tasks that were asked for."""

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
from trainer.evaluate.retrieval import retrieval
from trainer.evaluate.towers import Embedded, Tokenizer, Towers
from trainer.evaluate.zero_shot import zero_shot
from trainer.ranks import Ranks


def evaluate(
    model: nn.Module,
    batches: Iterable[EvalBatch],  # this rank's, perhaps none
    tokenizer: Tokenizer,
    config: EvalConfig,
    ranks: Ranks,
    *,
    autocast: torch.dtype | None = None,  # bfloat16, float16; None: float32
) -> dict[str, float]:
    """Plain numbers of `config.tasks` over all samples of all ranks; the same dict on every rank.

    Collective: every rank calls it, and gets what one process would that saw every sample. The
    model is in evaluation mode meanwhile. Raises ConfigError for templates or classes that do not
    fit, DataError when there is nothing to evaluate.
    """
    towers = Towers(model, ranks, batch_size=config.batch_size, autocast=autocast)
    was_training = model.training
    model.eval()
    try:
        embedded = towers.embed(batches)
        counts = torch.tensor([len(embedded.ids), embedded.num_bad], device=ranks.device)
        num_images, num_bad = sum_over_ranks(counts, ranks.group).tolist()
        if num_images == 0:
            raise DataError("there is no sample to evaluate")
        results: dict[str, float] = {"num_images": num_images, "num_bad": num_bad}
        for task in config.tasks:
            results |= TASKS[task](towers, embedded, tokenizer, config, ranks.group)
    finally:
        model.train(was_training)
    return results


def evaluate_retrieval(
    towers: Towers,
    embedded: Embedded,
    _tokenizer: Tokenizer,
    _config: EvalConfig,
    group: ProcessGroup | None,
) -> dict[str, float]:
    """Captions against images and images against captions, all of the set."""
    texts = towers.embed_texts(embedded.tokens)
    return retrieval(
        embedded.images,
        texts,
        embedded.ids,
        embedded.owners,
        group,
        caption_ids=embedded.caption_ids,
    )


def evaluate_zero_shot(
    towers: Towers,
    embedded: Embedded,
    tokenizer: Tokenizer,
    config: EvalConfig,
    group: ProcessGroup | None,
) -> dict[str, float]:
    """Images against class names in prompts."""
    classes = find_classes(config, embedded, group)
    embeddings, labels = towers.embed_classes(classes, config.templates, tokenizer)
    return zero_shot(embedded.images, embedded.labels, embeddings, labels, group)


TASKS = {"retrieval": evaluate_retrieval, "zero_shot": evaluate_zero_shot}


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
