"""From a configuration to its model and its objective."""

from pathlib import Path

import torch

from data.dataset import SampleSet
from data.labels import check_labels
from trainer.centers import ClassCenters
from trainer.centers.files import StoredCenters
from trainer.centers.identities import label_names
from trainer.centers.start import (
    assign_rows,
    assign_rows_from,
    assign_rows_of,
    open_source,
    start_from,
)
from trainer.config import Config, ConfigError
from trainer.engine import Engine
from trainer.hardness import ClustersOf, Hardness, build_hardness
from trainer.models import FaceModel, TextModel, TwoTower, build_face_model, build_text_model
from trainer.models import build_model as build_towers
from trainer.objectives.centers import CenterObjective
from trainer.objectives.label_sides import build_label_objective
from trainer.objectives.objective import Model, Objective
from trainer.objectives.pairs import PairObjective
from trainer.precision import autocast_dtype
from trainer.ranks import Ranks


def build_model(
    config: Config, *, device: torch.device | str = "cpu", load_weights: bool = True
) -> Model:
    """What `[model]` and `[loss]` name: a face backbone, text towers, or image and text towers."""
    seed = config.train.seed
    if config.has_labels:
        return build_text_model(
            config.model,
            loss_name=config.loss.name,
            embeds_labels=config.labels.rows == "texts",
            seed=seed,
            device=device,
            load_weights=load_weights,
        )
    if config.has_centers:
        return build_face_model(config.model, seed=seed, device=device, load_weights=load_weights)
    return build_towers(
        config.model,
        loss_name=config.loss.name,
        seed=seed,
        device=device,
        load_weights=load_weights,
    )


def build_objective(
    config: Config,
    model: Model,
    engine: Engine,
    samples: SampleSet,
    ranks: Ranks,
    *,
    checkpoint: Path | None,  # from which `load` will take the state
    clusters_of: ClustersOf | None = None,  # positions -> clusters of planned batches
) -> Objective:
    """What `[loss]` says; raises ConfigError or DataError where the data does not fit it."""
    hardness = build_hardness(config, samples.epoch_samples, ranks.group, clusters_of)
    if isinstance(model, TwoTower):
        # Embeddings of bfloat16 towers have no more digits than that to lose on their way.
        dtype = autocast_dtype(config.train.precision, ranks.device)
        wire = dtype if dtype == torch.bfloat16 else None
        return PairObjective(config.loss, model, engine, ranks, wire, hardness)
    if isinstance(model, TextModel):
        return build_label_objective(
            config, model, engine, samples, ranks, hardness, draw=checkpoint is None
        )
    return _center_objective(config, model, samples, ranks, checkpoint, hardness)


def _center_objective(
    config: Config,
    model: FaceModel,
    samples: SampleSet,
    ranks: Ranks,
    checkpoint: Path | None,
    hardness: Hardness,
) -> CenterObjective:
    turns = config.centers.classes_per_label
    num_labels = turns * check_labels(samples, config.centers.num_classes)
    stored = source = None
    if checkpoint is not None:
        stored = StoredCenters.open(checkpoint)
    path, labels = config.centers.identities, None
    if turns == 1 and (path or stored is None or stored.has_names):
        labels = label_names(path, samples, num_labels)
    if stored is not None:
        rows = assign_rows_of(stored, labels, num_labels)
    elif config.centers.init:
        source = open_source(config.centers.init, ranks.group)
        rows = assign_rows_from(source, labels, num_labels)
    else:
        rows = assign_rows(labels, num_labels)
    if rows.num_rows < 2:
        raise ConfigError(
            f"loss.name = {config.loss.name!r}: the training data has one identity, and a softmax "
            "needs at least 2: give images of others too, or set data.label_key to the ending of "
            "the label member"
        )
    centers = ClassCenters(
        rows.num_rows,
        model.embed_dim,
        ranks.group,
        loss=config.loss,
        config=config.centers,
        seed=config.train.seed,
        device=ranks.device,
        draw=checkpoint is None,
    )
    if source is not None and rows.sources is not None:
        start_from(centers, source, rows.sources)
    return CenterObjective(centers, rows, ranks, hardness=hardness, turns=turns)
