"""Running statistics of batch norms, which DeepSpeed leaves different on every rank."""

import torch
import torch.distributed as dist
from torch import nn

from trainer.ranks import Ranks


@torch.no_grad()
def average_buffers(model: nn.Module, ranks: Ranks) -> None:
    """Replace every float buffer by its mean over ranks; a collective.

    Needed before the model is evaluated or saved, and only there: a running statistic is linear in
    the batches' own, so the mean is the same however often it was taken before.
    """
    floats = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
    if not floats or ranks.world_size == 1:
        return
    flat = torch.cat([buffer.flatten().float() for buffer in floats])
    dist.all_reduce(flat, group=ranks.group)
    flat /= ranks.world_size
    parts = flat.split([buffer.numel() for buffer in floats])
    for buffer, part in zip(floats, parts, strict=True):
        buffer.copy_(part.view_as(buffer))
