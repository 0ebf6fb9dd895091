"""From a configuration to its model and its objective."""

import torch

from data.dataset import SampleSet
from data.labels import check_labels
from trainer.centers import ClassCenters
from trainer.centers.identities import load_identities
from trainer.centers.start import start_from
from trainer.config import Config, ConfigError
from trainer.engine import Engine
from trainer.models import TwoTower
from trainer.models import build_model as build_towers
from trainer.models.faces import FaceModel, build_face_model
from trainer.objectives.centers import CenterObjective
from trainer.objectives.objective import Model, Objective
from trainer.objectives.pairs import PairObjective
from trainer.ranks import Ranks

# Embeddings that come from bfloat16 towers have no more digits than this to lose on their way.
WIRE = {"bf16": torch.bfloat16}


def build_model(
    config: Config, *, device: torch.device | str = "cpu", load_weights: bool = True
) -> Model:
    """The model that `[model]` and `[loss]` name: a face backbone, or image and text towers."""
    seed = config.train.seed
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
    resumed: bool,  # the state comes from a checkpoint
) -> Objective:
    """What `[loss]` says; raises ConfigError or DataError where the data does not fit it."""
    if isinstance(model, TwoTower):
        wire = WIRE.get(config.train.precision)
        return PairObjective(config.loss, model, engine, ranks, wire)
    return _center_objective(config, model, samples, ranks, resumed=resumed)


def _center_objective(
    config: Config,
    model: FaceModel,
    samples: SampleSet,
    ranks: Ranks,
    *,
    resumed: bool,
) -> CenterObjective:
    num_classes = check_labels(samples, config.centers.num_classes)
    names = load_identities(config.centers.identities) if config.centers.identities else None
    if names is not None and len(names) != num_classes:
        raise ConfigError(
            f"centers.identities names {len(names):,} classes, the run has {num_classes:,}"
        )
    centers = ClassCenters(
        num_classes,
        model.embed_dim,
        ranks.group,
        loss=config.loss,
        config=config.centers,
        seed=config.train.seed,
        device=ranks.device,
        draw=not resumed,
    )
    if config.centers.init and not resumed:
        start_from(centers, config.centers.init, names)
    return CenterObjective(centers, names, ranks)
