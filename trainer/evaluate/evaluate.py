"""`evaluate`: towers over an evaluation set, then the tasks that were asked for."""

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from trainer.config import EvalConfig
from trainer.ranks import Ranks


class EvalBatch(Protocol):
    """Samples with all their captions; each sample is in exactly one batch of one rank.

    For numbers that are bit-equal at any world size, batch b of the set goes whole to rank
    b % world_size.
    """

    images: Tensor  # (n, 3, H, W) uint8
    texts: Tensor  # (m, T) int64 tokens, m >= n: all captions of the n samples
    owners: Tensor  # (m,) int64 row in this batch of the image a caption belongs to
    ids: Tensor  # (n,) int64 sample id, unique over the set
    caption_ids: Tensor  # (m,) int64 hash of the caption
    labels: Tensor  # (n,) int64, -1 when unknown
    captions: list[str]  # the m captions as text


def evaluate(
    model: nn.Module,
    batches: Iterable[EvalBatch],  # this rank's
    tokenizer: Callable[[list[str]], Tensor],  # (m,) texts -> (m, T) int64
    config: EvalConfig,
    ranks: Ranks,
    *,
    tasks: Sequence[str] = (),  # empty: config.tasks
    autocast: torch.dtype | None = None,  # bfloat16, float16; None: float32
) -> dict[str, float]:
    """Plain numbers of the tasks on all samples of all ranks; the same dict on every rank.

    Collective: every rank calls it, also one that has no batch. Raises ConfigError for a task or
    class names that do not fit the data.
    """
    raise NotImplementedError
