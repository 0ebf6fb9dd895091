"""DEXML's soft top-k: a query's positives are to be among the k labels that it ranks first."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from trainer.losses.listed import Inputs, Listed, Positives, list_pairs
from trainer.similarity.closed_form import attach_gradients, needs_gradient, plain_arithmetic
from trainer.similarity.pairs import Tile
from trainer.similarity.statistics import add_logsumexp

# Measured for 128 queries: 2 to 5 at alpha * scale = 20, up to 10 at 40, 17 at 200, where labels
# are clearly in or out and bisections help; alone, they would end within the bits of a float64.
_MOST_STEPS = 100


def soft_topk_loss(  # noqa: PLR0913 - a loss's inputs, and its own options
    queries: Tensor,  # (n, d) unit rows, this rank's; n may differ from rank to rank
    labels: Tensor,  # (m, d) unit rows, this rank's; m may differ from rank to rank
    scale: Tensor,  # () or (1,) multiplier of the cosines
    positives: Positives,
    label_ids: Tensor,  # (m,) int global ids of the label rows
    group: ProcessGroup | None = None,
    *,
    k: int = 0,  # 0: as many as the query has positives
    alpha: float = 2.0,
    drawn: Tensor | None = None,  # (n,) int the one positive that pulls, -1: none; None: all
    row_weights: Tensor | None = None,  # (n,) of the queries' losses; None: all 1
    labels_are_parts: bool = False,
    tile: int | None = None,
) -> Tensor:  # () this rank's mean over its n queries
    """Mean over a query's positives of -log sigmoid(alpha (s + t)), with t such that k labels pass.

    Gupta et al. 2024 (DEXML), arXiv 2310.10636: t solves sum over labels of sigmoid(alpha (s + t))
    = k, s = scale * cosine, and is differentiated implicitly. Positives that are not `drawn` are no
    labels of the query at all. With k = 0 a query whose labels are all positives adds 0.

    Ranks, masks, weights, gradients and `labels_are_parts` as in `decoupled_loss`. The root takes a
    few sweeps, each with two numbers a query over ranks; where tiles are not kept each is a product
    of 2 N L d / W FLOPs. Raises ValueError unless k is below the number of labels that count.
    """
    if k < 0:
        raise ValueError(f"k={k}: give the number of labels to be ranked first, or 0")
    if not 0 < alpha < math.inf:
        raise ValueError(f"alpha={alpha}: give a steepness above 0")
    inputs = (queries, labels, scale)
    needed = needs_gradient(*inputs)
    with plain_arithmetic(queries.device):
        listed = list_pairs(
            Inputs(queries, labels, scale, positives, label_ids, drawn, row_weights),
            group,
            labels_are_parts=labels_are_parts,
            tile=tile,
            sharpness=alpha,
        )
        ranking = _measure(listed, k)
        value = listed.mean(ranking.losses)
        if not any(needed):
            return value
        gradients = listed.gradients(ranking.weights, needed)
    return attach_gradients(value, inputs, gradients)


class _Wanted(NamedTuple):
    """What a query asks for, (N,) each."""

    k: Tensor
    candidates: Tensor
    """Labels that count for the query."""
    asked: Tensor
    """bool: it has a positive, and more candidates than k."""

    def log_odds(self) -> Tensor:
        """Of a label to pass, if all were alike; 0 where nothing is asked."""
        odds = self.k.log() - (self.candidates - self.k).log()
        return odds.where(self.asked, torch.zeros_like(odds))


@dataclass(frozen=True)
class _Ranking:
    """Losses, and the pair weights that follow from the roots. x = alpha (s + t)."""

    listed: Listed
    losses: Tensor  # (N,)
    shifts: Tensor  # (N,) alpha t
    pushes: Tensor  # (N,) weight of a label over its sigmoid's slope
    pulls: Tensor  # (p,)

    def weights(self, tile: Tile) -> Tensor:  # (m, k)
        """dloss/dlogit; uses up the tile's memory."""
        _mask(self.listed, tile)
        x = tile.values.add_(self.shifts[tile.columns])
        weights = torch.neg(x, out=tile.scratch).sigmoid_().mul_(x.sigmoid_())
        weights.mul_(self.pushes[tile.columns])
        span, at = self.listed.positives.at(tile)
        weights[at] -= self.pulls[span]
        return weights


def _measure(listed: Listed, k: int) -> _Ranking:
    """The roots, then each positive at the root of its query."""
    wanted = _want(listed, k)
    logits = listed.pairs.new_values(len(listed.positives))
    lowest = _lower_ends(listed, wanted, logits)
    shifts, slopes = _solve(listed, wanted, lowest)
    x = logits + listed.per_positive(shifts)
    asked = listed.per_positive(wanted.asked)
    steepness = (-x).sigmoid() * asked
    terms = torch.stack([torch.logaddexp(-x, torch.zeros_like(x)) * asked, steepness], dim=1)
    losses, pushes = listed.mean_over_positives(terms).unbind(1)
    # Where every label is clearly in or out, no slope is left in float32, and none is asked for.
    pushes = pushes / slopes.clamp(min=torch.finfo(slopes.dtype).tiny)
    return _Ranking(listed, losses, shifts, pushes, listed.pulls(steepness))


def _want(listed: Listed, k: int) -> _Wanted:
    num_positives = listed.num_positives
    candidates = (listed.num_labels - listed.num_masked).to(num_positives.dtype)
    wanted = torch.full_like(num_positives, k) if k else num_positives
    asked = num_positives > 0
    impossible = asked & (wanted >= candidates)
    if k and impossible.any():
        query = int(impossible.nonzero()[0])
        raise ValueError(
            f"k={k} of {int(candidates[query])} labels for query {query} of the global batch:"
            " choose a smaller k, or have more labels in a batch"
        )
    return _Wanted(wanted, candidates, asked & ~impossible)


def _mask(listed: Listed, tile: Tile) -> Tensor:  # positives of the tile
    """Take out positives that were not drawn; the logits of all of them."""
    span, at = listed.positives.at(tile)
    found = tile.values[at]
    tile.values[at] = found.masked_fill(~listed.drawn[span], -torch.inf)
    return found


def _lower_ends(listed: Listed, wanted: _Wanted, logits: Tensor) -> Tensor:  # (N,)
    """Shifts at which sigmoids sum to k at most; notes positives' logits on the way.

    sigmoid(x) < exp(x), so the sum is below k where the sum of exp is k.
    """
    pairs = listed.pairs
    sums = pairs.new_columns(-torch.inf)
    for tile in pairs.tiles():
        span, _ = listed.positives.at(tile)
        logits[span] = _mask(listed, tile)
        add_logsumexp(sums[tile.columns], tile.values, 0, tile.scratch)
    sums = pairs.merge_columns(sums, lambda shares: shares.logsumexp(0))
    return (wanted.k.log() - sums).where(wanted.asked, torch.zeros_like(sums))


def _solve(listed: Listed, wanted: _Wanted, at: Tensor) -> tuple[Tensor, Tensor]:  # (N,), (N,)
    """Shifts at which sigmoids sum to k, and the sums of their slopes there.

    Newton's steps on the log-odds of the share that passes, which is nearly straight in the shift;
    a step that leaves the bracket, or does not halve the one before, is a bisection instead. All
    ranks see the same sums, so they stop together.
    """
    bound, odds = listed.pairs.bound(), wanted.log_odds()
    precision = 4 * torch.finfo(at.dtype).eps * (1 + bound)
    k, rest = wanted.k.clamp(min=1), (wanted.candidates - wanted.k).clamp(min=1)
    lower, upper = torch.maximum(at, odds - bound), odds + bound
    at, last = lower.clone(), torch.full_like(at, torch.inf)
    for _ in range(_MOST_STEPS):
        excess, slopes = _pass(listed, wanted, at)
        lower = torch.where(excess <= 0, at, lower)
        upper = torch.where(excess >= 0, at, upper)
        done = (excess.abs() <= precision * slopes) | (upper - lower <= precision) | ~wanted.asked
        if done.all():
            break
        straight = (k + excess) * (rest - excess) / ((k + rest) * slopes)
        step = straight * ((-excess / rest).log1p() - (excess / k).log1p())
        newton = (at + step >= lower) & (at + step <= upper) & (step.abs() <= last / 2)
        last = torch.where(newton, step.abs(), upper - lower)
        step = torch.where(newton, step, (upper - lower) / 2 + lower - at)
        at = torch.where(done, at, at + step)
    return at, slopes


def _pass(listed: Listed, wanted: _Wanted, shifts: Tensor) -> tuple[Tensor, Tensor]:  # (N,), (N,)
    """Sum over all labels of sigmoid(logit + shift), less k, and the sum of its slope.

    A label that passes counts as 1 less what its sigmoid lacks: where k labels are clearly in and
    the others out, the difference to k lies in the tails alone, below what a plain sum resolves.
    """
    pairs = listed.pairs
    sums = torch.stack([pairs.new_columns(0.0)] * 3, dim=1)
    for tile in pairs.tiles():
        _mask(listed, tile)
        x = torch.add(tile.values, shifts[tile.columns], out=tile.scratch)
        tails = x.abs().neg_().sigmoid_()
        sums[tile.columns, 0] += (x > 0).sum(0)
        sums[tile.columns, 1] -= torch.copysign(tails, x, out=x).sum(0)
        sums[tile.columns, 2] += torch.addcmul(tails, tails, tails, value=-1, out=x).sum(0)
    passing, tails, slopes = pairs.merge_columns(sums, lambda shares: shares.sum(0)).unbind(1)
    return passing - wanted.k + tails, slopes
