"""The `[loss]` section becomes one function of a step's embeddings and batch."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from data.loader import Batch
from trainer.config import LossConfig
from trainer.losses import clip_loss, siglip_loss
from trainer.models import Embeddings

Objective = Callable[[Embeddings, Batch], Tensor]


def build_objective(config: LossConfig, group: ProcessGroup | None) -> Objective:
    """The loss of `config.name`: (this rank's embeddings, its batch) -> this rank's mean, ()."""
    return OBJECTIVES[config.name](config, group)


def _clip(config: LossConfig, group: ProcessGroup | None) -> Objective:
    def objective(embeddings: Embeddings, batch: Batch) -> Tensor:
        ids, caption_ids = _identities(config, batch, embeddings.scale.device)
        return clip_loss(
            embeddings.images,
            embeddings.texts,
            embeddings.scale,
            group,
            label_smoothing=config.label_smoothing,
            ids=ids,
            caption_ids=caption_ids,
            visiting=config.visiting,
        )

    return objective


def _siglip(config: LossConfig, group: ProcessGroup | None) -> Objective:
    def objective(embeddings: Embeddings, batch: Batch) -> Tensor:
        ids, caption_ids = _identities(config, batch, embeddings.scale.device)
        return siglip_loss(
            embeddings.images,
            embeddings.texts,
            embeddings.scale,
            embeddings.bias,
            group,
            ids=ids,
            caption_ids=caption_ids,
            visiting=config.visiting,
        )

    return objective


OBJECTIVES = {"clip": _clip, "siglip": _siglip}


def _identities(
    config: LossConfig, batch: Batch, device: torch.device
) -> tuple[Tensor | None, Tensor | None]:
    ids = batch.ids.to(device) if config.mask_equal_ids else None
    caption_ids = batch.caption_ids.to(device) if config.mask_equal_captions else None
    return ids, caption_ids
