"""What sampled rows see in the columns of all ranks, from each rank's own columns.

Cosines with texts and labels are float64 sums rounded to float32, as `trainer/evaluate/nearest.py`
does: so equal texts have equal cosines, and counts are the same at any world size. No two centers
are equal, and they are many: float32 will do.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from trainer.collectives import gather_rows, max_over_ranks

TOP = 10
_BLOCK = 2048  # columns read together


class Table(NamedTuple):
    """Sampled rows against this rank's columns; a pair is positive, masked or a negative."""

    cosines: Tensor
    """(s, m) float64."""
    positive: Tensor
    """(s, m) bool."""
    masked: Tensor
    """(s, m) bool: left out by the loss."""
    mates: Tensor | None
    """(s, m) bool: the column came with the row's cluster; None: the batch was not planned."""


class RowStatistics(NamedTuple):
    """One value a sampled row, (s,) float64, over all ranks' columns; equal on every rank."""

    positive: Tensor
    """Nearest positive, -inf without one."""
    hardest: Tensor
    """Nearest negative, -inf without one."""
    top: Tensor
    """Mean of the TOP nearest negatives, of fewer where there are fewer."""
    nearest_mate: Tensor
    """Nearest negative of the row's own cluster, -inf without one."""
    num_negatives: Tensor
    num_masked: Tensor
    num_suspected: Tensor
    """Negatives nearer than the positive."""
    effective: Tensor
    """exp(entropy of the softmax over negatives); 0 without one."""


def cosines_with(
    rows: Tensor,  # (s, d) in the dtype to sum in
    read: Callable[
        [Tensor], Tensor
    ],  # (k,) places -> (k, d), or (k, c, d): the nearest of c counts
    places: Tensor,  # (m,) int64
) -> Tensor:  # (s, m) float64
    """Cosines with the columns at these places, a block at a time."""
    table = torch.empty(len(rows), len(places), dtype=torch.float64, device=rows.device)
    for start in range(0, len(places), _BLOCK):
        block = read(places[start : start + _BLOCK]).to(rows.dtype)
        flat = block.flatten(0, -2)
        values = (rows @ flat.T).view(len(rows), len(block), len(flat) // len(block)).amax(2)
        table[:, start : start + _BLOCK] = values.float()
    return table


def reduce_columns(table: Table, scale: float, group: ProcessGroup | None) -> RowStatistics:
    """Sums, extremes and counts of every row over all ranks' columns. Collective.

    `scale` turns cosines into the logits of the softmax. Sends 17 numbers a row and rank.
    """
    none = table.cosines.new_full((len(table.cosines), TOP), -torch.inf)
    positive = _padded_max(table.cosines, table.positive)
    positive = max_over_ranks(positive, group)
    is_negative = ~(table.positive | table.masked)
    negatives = table.cosines.masked_fill(~is_negative, -torch.inf)
    top = torch.cat([negatives, none], dim=1).topk(TOP, dim=1).values
    mates = none[:, 0] if table.mates is None else _padded_max(negatives, table.mates)
    suspected = is_negative & (negatives > positive.unsqueeze(1))
    share = torch.cat(
        [
            top,
            torch.stack([mates, *_softmax_share(negatives, top[:, 0], scale)], dim=1),
            torch.stack([t.sum(1) for t in (is_negative, table.masked, suspected)], dim=1).double(),
        ],
        dim=1,
    )
    everyone = share.unsqueeze(0)
    if group is not None:
        everyone = gather_rows(everyone, [1] * group.size(), group)
    return _merge(positive, everyone, scale)


def _padded_max(values: Tensor, where: Tensor) -> Tensor:  # (s, m), (s, m) -> (s,)
    """Largest value of each row where the table is true, -inf where it nowhere is."""
    if values.shape[1] == 0:
        return values.new_full(values.shape[:1], -torch.inf)
    return values.masked_fill(~where, -torch.inf).amax(1)


def _softmax_share(negatives: Tensor, top: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Sums of p = exp(x - x_top) and of p (x - x_top) over this rank's negatives x."""
    below = (negatives - _finite(top).unsqueeze(1)) * scale
    powers = below.exp()
    return powers.sum(1), (powers * below.masked_fill(below == -torch.inf, 0.0)).sum(1)


def _merge(positive: Tensor, everyone: Tensor, scale: float) -> RowStatistics:
    """Every rank's share (W, s, TOP + 6) of the statistics, put together."""
    tops, mates, mass, moment = everyone[..., :TOP], *everyone[..., TOP : TOP + 3].unbind(2)
    top = tops.transpose(0, 1).flatten(1).topk(TOP, dim=1).values
    found = top.isfinite()
    hardest = top[:, 0]
    lower = (tops[..., 0] - _finite(hardest)) * scale  # -inf: no negative there
    fade = lower.exp()
    lower = lower.masked_fill(lower == -torch.inf, 0.0)
    total = (fade * mass).sum(0)
    entropy = total.log() - (fade * (moment + lower * mass)).sum(0) / total
    num_negatives, num_masked, num_suspected = everyone[..., TOP + 3 :].sum(0).unbind(1)
    return RowStatistics(
        positive,
        hardest,
        top.masked_fill(~found, 0.0).sum(1) / found.sum(1),
        mates.amax(0),
        num_negatives,
        num_masked,
        num_suspected,
        torch.where(num_negatives > 0, entropy.exp(), 0.0),
    )


def _finite(values: Tensor) -> Tensor:
    """0 for -inf, so that -inf - (-inf) is -inf."""
    return values.masked_fill(values == -torch.inf, 0.0)
