"""Supervised contrastive loss over all ranks' embeddings."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from trainer.losses.checks import check_scalar
from trainer.losses.labelled import Labelled, label
from trainer.similarity.closed_form import attach_gradients, needs_gradient, plain_arithmetic
from trainer.similarity.pairs import Tile
from trainer.similarity.statistics import add_logsumexp


def supcon_loss(
    embeddings: Tensor,  # (n, d) unit rows, this rank's; n may differ from rank to rank
    labels: Tensor,  # (n,) int; every other row of the label is a positive
    scale: Tensor,  # () or (1,) multiplier of the cosines, 1 / temperature
    group: ProcessGroup | None = None,
    *,
    ids: Tensor | None = None,  # (n,) int; rows of one id are no pair at all
    visiting: str = "gather",
    tile: int | None = None,
) -> Tensor:  # () this rank's mean over its n rows
    """Mean over rows of -log p of their positives, p a softmax over all other rows.

    Khosla et al. 2020, arXiv 2004.11362, equation 2 (the mean outside the logarithm). A row without
    a positive adds 0 and stays in the divisor. Ranks and gradients as in `clip_loss`.
    """
    check_scalar("scale", scale)
    inputs = (embeddings, scale)
    needed = needs_gradient(*inputs)
    with plain_arithmetic(embeddings.device):
        labelled = label(
            embeddings, labels, float(scale), group, ids=ids, visiting=visiting, tile=tile
        )
        softmax = _measure(labelled)
        value = softmax.losses().sum() * labelled.share
        if not any(needed):
            return value
        rows, visitors = labelled.pairs.gradients(
            lambda tile_now: softmax.weights(labelled, tile_now), visitors=needed[0]
        )
        slope = (rows * labelled.embeddings).sum() * labelled.share
        total = (rows + visitors) * (labelled.scale * labelled.share)
    return attach_gradients(value, inputs, (total, slope))


@dataclass(frozen=True)
class _Softmax:
    """Statistics of the logits of this rank's rows, (n,) each."""

    logsumexps: Tensor
    num_positives: Tensor
    positive_sums: Tensor

    def losses(self) -> Tensor:  # (n,)
        """Rows without a positive are 0, also where there is no other row at all."""
        losses = self.logsumexps - self.positive_sums / self.num_positives.clamp(min=1)
        return losses.masked_fill(self.num_positives == 0, 0.0)

    def weights(self, labelled: Labelled, tile: Tile) -> Tensor:  # (m, k)
        """Probabilities less the targets; 0 in rows without a positive."""
        positives = labelled.positives(tile)
        num_positives = self.num_positives[tile.rows].unsqueeze(1)
        shifts = self.logsumexps[tile.rows].unsqueeze(1).masked_fill(num_positives == 0, torch.inf)
        weights = torch.sub(tile.values, shifts, out=tile.scratch).exp_()
        return weights.sub_(positives / num_positives.clamp(min=1))


def _measure(labelled: Labelled) -> _Softmax:
    """The statistics pass."""
    pairs = labelled.pairs
    statistics = _Softmax(pairs.new_rows(-torch.inf), pairs.new_rows(0.0), pairs.new_rows(0.0))
    for tile in pairs.tiles():
        positives = labelled.positives(tile)
        add_logsumexp(statistics.logsumexps[tile.rows], tile.values, 1, tile.scratch)
        statistics.num_positives[tile.rows] += positives.sum(1)
        statistics.positive_sums[tile.rows] += tile.values.masked_fill(~positives, 0.0).sum(1)
    return statistics
