"""The training samples of a configuration, and whether a run on them can work at all."""

from collections.abc import Callable

import torch
import torch.distributed as dist

from data.dataset import SampleSet, build_sample_set
from data.index import Index, load_index
from data.labels import check_labels
from trainer.centers import ClassCenters
from trainer.config import Config, ConfigError
from trainer.estimate.machines import available_memory
from trainer.estimate.state import EngineState, Towers
from trainer.estimate.terms import total
from trainer.objectives import build_model
from trainer.objectives.label_sides import load_labels
from trainer.ranks import Ranks

Progress = Callable[[int, int], None]


def index_shards(
    shards: str | list[str], config: Config, progress: Progress | None = None
) -> Index:
    """The index of some shards with the member names of `[data]`; built where it is missing.

    A run against class centers needs no captions; one of texts against labels no images, but lists
    of labels.
    """
    return load_index(
        shards,
        image_key="" if config.has_labels else config.data.image_key,
        caption_key="" if config.has_centers else config.data.caption_key,
        label_key=config.data.label_key,
        label_lists=config.has_labels,
        progress=progress,
    )


def build_samples(config: Config, progress: Progress | None = None) -> SampleSet:
    """All training sources as one set. Raises ConfigError where none is named."""
    sources = config.data.all_sources()
    if not sources:
        raise ConfigError(
            "no training data: set data.shards, e.g. --data.shards=/datasets/x-{000..007}.tar"
        )
    indexes = [index_shards(source.shards, config, progress) for source in sources]
    return build_sample_set(indexes, config.data, seed=config.train.seed)


def load_samples(config: Config, ranks: Ranks) -> SampleSet:
    """As `build_samples` on every rank, with the index built by the first one alone."""
    if ranks.is_first:
        samples = build_samples(config)
    dist.barrier(group=ranks.group)
    return samples if ranks.is_first else build_samples(config)


def check_fit(config: Config, samples: SampleSet, world_size: int) -> None:
    """Raise DataError or ConfigError for a batch, set and number of ranks that do not fit."""
    batch = config.train.global_batch_size
    samples.check_batch_size(batch)
    if world_size > batch:
        raise ConfigError(
            f"{world_size} ranks for train.global_batch_size = {batch}: some would have no sample; "
            "start at most that many, or raise the batch"
        )


def count_classes(config: Config, samples: SampleSet) -> int:
    """Class centers or classifiers of a run, 0 for one without.

    Raises DataError for labels that do not fit, or that have no text.
    """
    if config.has_labels:
        _, table = load_labels(config, samples)
        return table.num_labels if config.labels.rows == "classifiers" else 0
    if not config.has_centers:
        return 0
    labels = check_labels(samples, config.centers.num_classes)
    return labels * config.centers.classes_per_label


def check_memory(config: Config, num_ranks: int, num_classes: int = 0) -> None:
    """Raise ConfigError when the state of `num_ranks` CPU ranks cannot fit this machine's memory.

    Counts what DeepSpeed holds of the towers while it reduces gradients, and class centers, as
    `nsphere estimate` does; activations come on top.
    """
    model = build_model(config, device="meta")
    if torch.cuda.is_available():
        return
    towers = Towers.of(model, config.optim)
    state = EngineState.of(towers, config, num_ranks, is_gpu=False)
    centers = num_classes * ClassCenters.bytes_per_class(config.centers, config.model.embedding_dim)
    needed = num_ranks * total([*state.at_rest(), *state.while_reducing()]) + centers
    available = available_memory()
    if needed > available:
        raise ConfigError(
            f"--nproc {num_ranks}: {towers.num_parameters:,} parameters need {needed / 2**30:.1f} "
            f"GiB for weights, gradients and optimizer state, {centers / 2**30:.1f} GiB of that for"
            f" {num_classes:,} class centers, {available / 2**30:.1f} GiB are free here; start "
            "fewer ranks, take a smaller model.name, or 'bfloat16' for centers.dtype and "
            "centers.momentum_dtype; `nsphere estimate --gpu cpu` shows every term"
        )
