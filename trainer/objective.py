"""The `[loss]` section becomes one function of a step's embeddings and batch."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from data.loader import Batch
from trainer.config import LossConfig
from trainer.losses import clip_loss, siglip_loss


class Pairs(NamedTuple):
    """Both sides of a step's image-text pairs, row i of each belonging together."""

    images: Tensor  # (n, d) unit rows
    texts: Tensor  # (n, d) unit rows
    scale: Tensor  # (1,) multiplier of the cosines
    bias: Tensor | None  # (1,) SigLIP's, else None


Objective = Callable[[Pairs, Batch], Tensor]


def build_objective(
    config: LossConfig, group: ProcessGroup | None, wire: torch.dtype | None = None
) -> Objective:
    """The loss of `config.name`: (this rank's embeddings, its batch) -> this rank's mean, ().

    `wire` is the dtype in which texts and their gradients travel between ranks; None: float32.
    """
    return OBJECTIVES[config.name](config, group, wire)


def _clip(config: LossConfig, group: ProcessGroup | None, wire: torch.dtype | None) -> Objective:
    def objective(embeddings: Pairs, batch: Batch) -> Tensor:
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
            wire=wire,
        )

    return objective


def _siglip(config: LossConfig, group: ProcessGroup | None, wire: torch.dtype | None) -> Objective:
    def objective(embeddings: Pairs, batch: Batch) -> Tensor:
        if embeddings.bias is None:
            raise ValueError("siglip_loss needs a bias: build the model with loss_name='siglip'")
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
            wire=wire,
        )

    return objective


OBJECTIVES = {"clip": _clip, "siglip": _siglip}


def _identities(
    config: LossConfig, batch: Batch, device: torch.device
) -> tuple[Tensor | None, Tensor | None]:
    ids = batch.ids.to(device) if config.mask_equal_ids else None
    caption_ids = batch.caption_ids.to(device) if config.mask_equal_captions else None
    return ids, caption_ids
