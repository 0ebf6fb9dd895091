"""Decoupled softmax of DEXML: queries against labels of which each may have several."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from trainer.losses.listed import Inputs, Listed, Positives, list_pairs
from trainer.similarity.closed_form import attach_gradients, needs_gradient, plain_arithmetic
from trainer.similarity.pairs import Tile
from trainer.similarity.statistics import add_logsumexp


def decoupled_loss(
    queries: Tensor,  # (n, d) unit rows, this rank's; n may differ from rank to rank
    labels: Tensor,  # (m, d) unit rows, this rank's; m may differ from rank to rank
    scale: Tensor,  # () or (1,) multiplier of the cosines
    positives: Positives,
    label_ids: Tensor,  # (m,) int global ids of the label rows
    group: ProcessGroup | None = None,
    *,
    drawn: Tensor | None = None,  # (n,) int the one positive that pulls, -1: none; None: all
    row_weights: Tensor | None = None,  # (n,) of the queries' losses; None: all 1
    labels_are_parts: bool = False,
    tile: int | None = None,
) -> Tensor:  # () this rank's mean over its n queries
    """Mean over a query's positives of -log p, p a softmax over that positive and all negatives.

    Gupta et al. 2024 (DEXML), arXiv 2310.10636: a query's other positives leave the denominator.
    Where one is `drawn`, the others are masked and it is InfoNCE, whose name is `info_nce_loss`.

    Negatives of a query are the labels of all ranks that are none of its positives. A label id that
    several rows have counts once, by the first row in the order of the ranks; the others are masked
    and get no gradient. A query without a positive among all ranks' rows adds 0 and stays in the
    divisor. A rank returns W/N times the sum over its own queries, its mean where all ranks hold
    equally many; so the mean over ranks is the loss of the global batch. `row_weights` multiply the
    queries' terms; the divisor stays N.

    Gradients of queries and scale are to be averaged over ranks, and so are those of label rows, be
    they a tower's outputs. With `labels_are_parts`, rows owned by this rank alone, theirs is that
    of the global loss: it must not be averaged. All ranks must call it together.

    Queries visit, labels stay: costs 6 N L d / W FLOPs (8 where tiles are not kept), sends
    2 (1 - 1/W) N d elements and integers, and remembers O((N + m) d).
    """
    inputs = (queries, labels, scale)
    needed = needs_gradient(*inputs)
    with plain_arithmetic(queries.device):
        listed = list_pairs(
            Inputs(queries, labels, scale, positives, label_ids, drawn, row_weights),
            group,
            labels_are_parts=labels_are_parts,
            tile=tile,
        )
        softmax = _measure(listed)
        value = listed.mean(softmax.losses)
        if not any(needed):
            return value
        gradients = listed.gradients(softmax.weights, needed)
    return attach_gradients(value, inputs, gradients)


@dataclass(frozen=True)
class _Decoupled:
    """Losses, and the pair weights that follow from the log-sum-exps of the negatives."""

    listed: Listed
    losses: Tensor  # (N,)
    shifts: Tensor  # (N,) a negative's weight is exp(logit - shift)
    pulls: Tensor  # (p,)

    def weights(self, tile: Tile) -> Tensor:  # (m, k)
        """dloss/dlogit; uses up the tile's memory."""
        weights = tile.values.sub_(self.shifts[tile.columns]).exp_()
        span, at = self.listed.positives.at(tile)
        weights[at] = -self.pulls[span]
        return weights


def _measure(listed: Listed) -> _Decoupled:
    """The statistics pass: log-sum-exps of true negatives, then each positive against them."""
    pairs = listed.pairs
    negatives, logits = pairs.new_columns(-torch.inf), pairs.new_values(len(listed.positives))
    for tile in pairs.tiles():
        listed.take_positives(tile, logits)
        add_logsumexp(negatives[tile.columns], tile.values, 0, tile.scratch)
    negatives = pairs.merge_columns(negatives, lambda shares: shares.logsumexp(0))
    excess = listed.per_positive(negatives) - logits
    slopes = excess.sigmoid()
    terms = torch.stack([torch.logaddexp(excess, torch.zeros_like(excess)), slopes], dim=1)
    losses, pushes = listed.mean_over_positives(terms).unbind(1)
    # A query without a positive or negative pushes nothing: not -inf - (-inf).
    shifts = (negatives - pushes.log()).masked_fill(pushes == 0, torch.inf)
    return _Decoupled(listed, losses, shifts, listed.pulls(slopes))
