"""Multi-Similarity loss with mining over all ranks' embeddings."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from trainer.losses.labelled import Labelled, label
from trainer.similarity.closed_form import attach_gradients, needs_gradient, plain_arithmetic
from trainer.similarity.pairs import Tile
from trainer.similarity.statistics import add_logsumexp


def multi_similarity_loss(
    embeddings: Tensor,  # (n, d) unit rows, this rank's; n may differ from rank to rank
    labels: Tensor,  # (n,) int; every other row of the label is a positive
    group: ProcessGroup | None = None,
    *,
    alpha: float = 2.0,
    beta: float = 50.0,
    threshold: float = 0.5,
    epsilon: float = 0.1,
    ids: Tensor | None = None,  # (n,) int; rows of one id are no pair at all
    visiting: str = "gather",
    tile: int | None = None,
) -> Tensor:  # () this rank's mean over its n rows
    """Soft hinges around `threshold` on the mined positives and negatives of every row.

    Wang et al. 2019, arXiv 1904.06627, equations 11 to 15; defaults of the authors' code. A
    negative is mined within `epsilon` of the row's least similar positive or above, a positive
    within it of the most similar negative or below; infinity mines all. A row without positives or
    negatives adds 0 and stays in the divisor. Three passes. Ranks and gradients as in `clip_loss`.
    """
    (needed,) = needs_gradient(embeddings)
    with plain_arithmetic(embeddings.device):
        labelled = label(embeddings, labels, 1.0, group, ids=ids, visiting=visiting, tile=tile)
        mining = _Mining(labelled, *_extremes(labelled), epsilon=epsilon)
        hinges = _measure(mining, alpha, beta, threshold)
        losses = hinges.positives / alpha + hinges.negatives / beta
        value = losses.sum() * labelled.share
        if not needed:
            return value
        rows, visitors = labelled.pairs.gradients(hinges.weights)
        total = (rows + visitors) * labelled.share
    return attach_gradients(value, (embeddings,), (total,))


@dataclass(frozen=True)
class _Mining:
    """Which pairs count, from the extremes of each of this rank's rows."""

    labelled: Labelled
    least_positive: Tensor  # (n,) inf where there is none
    most_negative: Tensor  # (n,) -inf where there is none
    epsilon: float

    def select(self, tile: Tile) -> tuple[Tensor, Tensor]:  # (m, k) bool each
        """Mined positives and mined negatives."""
        positives = self.labelled.positives(tile)
        negatives = ~positives & (tile.values != -torch.inf)
        lowest = self.least_positive[tile.rows].unsqueeze(1)
        highest = self.most_negative[tile.rows].unsqueeze(1)
        # Infinite extremes decide on their own: inf - inf would let an infinite epsilon mine none.
        reachable = (lowest < torch.inf) & (highest > -torch.inf)
        positives &= reachable & (tile.values - self.epsilon < highest)
        negatives &= reachable & (tile.values + self.epsilon > lowest)
        return positives, negatives


@dataclass(frozen=True)
class _Hinges:
    """log(1 + sum of exponentials) of this rank's rows, and the pair weights that follow."""

    mining: _Mining
    alpha: float
    beta: float
    threshold: float
    positives: Tensor  # (n,)
    negatives: Tensor  # (n,)

    def exponents(self, tile: Tile) -> tuple[Tensor, Tensor]:  # (m, k) each, -inf where not mined
        """-alpha (S - threshold) of mined positives, beta (S - threshold) of mined negatives."""
        positives, negatives = self.mining.select(tile)
        excess = tile.values - self.threshold
        return (
            (excess * -self.alpha).masked_fill_(~positives, -torch.inf),
            (excess * self.beta).masked_fill_(~negatives, -torch.inf),
        )

    def weights(self, tile: Tile) -> Tensor:  # (m, k)
        """dL/dS times N, as in General Pair Weighting."""
        pulling, pushing = self.exponents(tile)
        pushing.sub_(self.negatives[tile.rows].unsqueeze(1)).exp_()
        return pushing.sub_(pulling.sub_(self.positives[tile.rows].unsqueeze(1)).exp_())


def _extremes(labelled: Labelled) -> tuple[Tensor, Tensor]:  # (n,), (n,)
    """First pass: every row's least similar positive and most similar negative."""
    least, most = labelled.pairs.new_rows(torch.inf), labelled.pairs.new_rows(-torch.inf)
    for tile in labelled.pairs.tiles():
        positives = labelled.positives(tile)
        low = tile.values.masked_fill(~positives, torch.inf).amin(1)
        high = tile.values.masked_fill(positives, -torch.inf).amax(1)
        torch.minimum(least[tile.rows], low, out=least[tile.rows])
        torch.maximum(most[tile.rows], high, out=most[tile.rows])
    return least, most


def _measure(mining: _Mining, alpha: float, beta: float, threshold: float) -> _Hinges:
    """Second pass: the sums of both exponentials, to which 1 = exp(0) belongs."""
    pairs = mining.labelled.pairs
    hinges = _Hinges(mining, alpha, beta, threshold, pairs.new_rows(0.0), pairs.new_rows(0.0))
    for tile in pairs.tiles():
        pulling, pushing = hinges.exponents(tile)
        add_logsumexp(hinges.positives[tile.rows], pulling, 1, tile.scratch)
        add_logsumexp(hinges.negatives[tile.rows], pushing, 1, tile.scratch)
    return hinges
