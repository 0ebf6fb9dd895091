"""Pairwise sigmoid loss of SigLIP over all ranks' pairs."""

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from trainer.losses.checks import check_scalar
from trainer.losses.matched import match
from trainer.similarity.closed_form import attach_gradients, needs_gradient, plain_arithmetic
from trainer.similarity.pairs import Tile
from trainer.similarity.statistics import softplus_sums


def siglip_loss(
    images: Tensor,  # (n, d) unit rows, this rank's; n may differ from rank to rank
    texts: Tensor,  # (n, d) unit rows; row i is the positive of images[i]
    scale: Tensor,  # () or (1,) multiplier of the cosines
    bias: Tensor,  # () or (1,) added to every logit
    group: ProcessGroup | None = None,
    *,
    ids: Tensor | None = None,  # (n,) int; equal ones are no negatives of each other
    caption_ids: Tensor | None = None,  # (n,) int; the same for equal captions
    visiting: str = "gather",
    wire: torch.dtype | None = None,
    tile: int | None = None,
) -> Tensor:  # () this rank's mean over its n rows
    """Sum over a row's pairs of the logistic losses, positive for its own text alone.

    Zhai et al. 2023, arXiv 2303.15343, algorithm 1: the sum over all N^2 pairs is divided by N. A
    rank returns W/N times the sum over its own rows, its mean where all ranks hold equally many; so
    the mean over ranks is the loss of the global batch, and gradients are to be averaged over
    ranks. All ranks must call it together.

    Options are those of `clip_loss`. There is no normaliser, so value and gradients come from one
    sweep: 6 N^2 d / W FLOPs.
    """
    check_scalar("bias", bias)
    inputs = (images, texts, scale)
    needed = needs_gradient(*inputs, bias)
    with plain_arithmetic(images.device):
        identities = {"ids": ids, "caption_ids": caption_ids}
        matched = match(
            *inputs,
            group,
            identities=identities,
            visiting=visiting,
            wire=wire,
            tile=tile,
            swept_once=True,
        )
        shift = bias.to(matched.pairs.dtype).reshape(())
        losses, slopes = matched.pairs.new_rows(0.0), matched.pairs.new_rows(0.0)

        def measure(tile: Tile) -> Tensor:
            matched.exclusion.exclude(tile)
            logits = tile.values.add_(shift)
            losses[tile.rows] += softplus_sums(logits, 1, tile.scratch)
            probabilities = logits.sigmoid_()
            slopes[tile.rows] += probabilities.sum(1)
            return probabilities

        if any(needed):
            gradients = matched.gradients(measure, -1.0, needed, mean=matched.share)
        else:
            for tile_now in matched.pairs.tiles():
                measure(tile_now)
        # softplus(-z) = softplus(z) - z turns the sum over all pairs into one with positives.
        value = (losses - matched.own_logits() - shift).sum() * matched.share
        if not any(needed):
            return value
        for_bias = (slopes - 1).sum() * matched.share
    return attach_gradients(value, (*inputs, bias), (*gradients, for_bias))
