"""From the `[loss]` table to one function that the step calls, whatever the loss is called."""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from trainer.losses.clip import clip_loss
from trainer.losses.siglip import siglip_loss


class LossOptions(Protocol):
    """What is read of the configuration's `[loss]`."""

    @property
    def label_smoothing(self) -> float: ...
    @property
    def mask_equal_ids(self) -> bool: ...
    @property
    def mask_equal_captions(self) -> bool: ...
    @property
    def visiting(self) -> str: ...


class Embedded(Protocol):
    """Both towers' unit rows of this rank's batch, (n, d) each."""

    @property
    def images(self) -> Tensor | None: ...
    @property
    def texts(self) -> Tensor | None: ...


class Identified(Protocol):
    """Which samples they are, (n,) int64 each, on the embeddings' device."""

    @property
    def ids(self) -> Tensor: ...
    @property
    def caption_ids(self) -> Tensor: ...


BatchLoss = Callable[
    [Embedded, Tensor, Tensor | None, Identified, ProcessGroup | None],  # scale, bias
    Tensor,  # () this rank's mean
]


def build_clip(options: LossOptions, wire: torch.dtype | None = None) -> BatchLoss:
    """`clip_loss` with the configured options; `wire` as there. The bias is not used."""

    def loss(
        embeddings: Embedded,
        scale: Tensor,
        _: Tensor | None,
        batch: Identified,
        group: ProcessGroup | None,
    ) -> Tensor:
        images, texts = _both(embeddings)
        return clip_loss(
            images,
            texts,
            scale,
            group,
            label_smoothing=options.label_smoothing,
            ids=batch.ids if options.mask_equal_ids else None,
            caption_ids=batch.caption_ids if options.mask_equal_captions else None,
            visiting=options.visiting,
            wire=wire,
        )

    return loss


def build_siglip(options: LossOptions, wire: torch.dtype | None = None) -> BatchLoss:
    """`siglip_loss` with the configured options; `wire` as there."""

    def loss(
        embeddings: Embedded,
        scale: Tensor,
        bias: Tensor | None,
        batch: Identified,
        group: ProcessGroup | None,
    ) -> Tensor:
        if bias is None:
            raise ValueError("siglip needs a bias: build the model with loss_name='siglip'")
        images, texts = _both(embeddings)
        return siglip_loss(
            images,
            texts,
            scale,
            bias,
            group,
            ids=batch.ids if options.mask_equal_ids else None,
            caption_ids=batch.caption_ids if options.mask_equal_captions else None,
            visiting=options.visiting,
            wire=wire,
        )

    return loss


def _both(embeddings: Embedded) -> tuple[Tensor, Tensor]:
    if embeddings.images is None or embeddings.texts is None:
        raise ValueError("this loss needs images and texts: call the model with both")
    return embeddings.images, embeddings.texts
