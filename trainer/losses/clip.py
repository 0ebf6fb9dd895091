"""Symmetric softmax loss of CLIP over all ranks' pairs."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from trainer.losses.matched import Matched, match
from trainer.similarity.closed_form import attach_gradients, needs_gradient, plain_arithmetic
from trainer.similarity.pairs import Tile
from trainer.similarity.statistics import add_logsumexp


def clip_loss(
    images: Tensor,  # (n, d) unit rows, this rank's; n may differ from rank to rank
    texts: Tensor,  # (n, d) unit rows; row i is the positive of images[i]
    scale: Tensor,  # () or (1,) multiplier of the cosines
    group: ProcessGroup | None = None,
    *,
    label_smoothing: float = 0.0,
    ids: Tensor | None = None,  # (n,) int; equal ones are no negatives of each other
    caption_ids: Tensor | None = None,  # (n,) int; the same for equal captions
    visiting: str = "gather",
    wire: torch.dtype | None = None,
    tile: int | None = None,
) -> Tensor:  # () this rank's mean over its n rows
    """Mean of the image-to-text and text-to-image cross entropies over all N pairs.

    Radford et al. 2021, arXiv 2103.00020, figure 3. A rank returns W/N times the sum over its own
    rows, its mean where all ranks hold equally many; so the mean over ranks is the loss of the
    global batch, and gradients are to be averaged over ranks. All ranks must call it together.

    Texts visit by `visiting` "gather", or "ring" with memory for two ranks' rows. `wire` is the
    dtype in which they and, when gathered, their gradients travel; None keeps theirs. Smoothing
    spreads over the pairs that are not excluded. Costs 8 N^2 d / W FLOPs, sends 2 (1 - 1/W) N d
    elements and remembers O((n + N) d).
    """
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing={label_smoothing} is no share: choose one in [0, 1)")
    inputs = (images, texts, scale)
    needed = needs_gradient(*inputs)
    with plain_arithmetic(images.device):
        identities = {"ids": ids, "caption_ids": caption_ids}
        matched = match(
            *inputs, group, identities=identities, visiting=visiting, wire=wire, tile=tile
        )
        softmax = _measure(matched, label_smoothing)
        target = 2 * (1 - label_smoothing)  # of a matching pair, in both directions
        losses = softmax.own_losses(matched) - target * matched.own_logits()
        value = losses.sum() * (matched.share / 2)
        if not any(needed):
            return value
        gradients = matched.gradients(
            lambda tile: softmax.weights(matched, tile), -target, needed, mean=matched.share / 2
        )
    return attach_gradients(value, inputs, gradients)


@dataclass(frozen=True)
class _Softmax:
    """Statistics of the logits: rows of this rank, columns of all ranks."""

    rows: Tensor  # (n,) log-sum-exp
    columns: Tensor  # (N,)
    row_sums: Tensor | None  # (n,) plain sums, where targets are smoothed
    column_sums: Tensor | None  # (N,)
    shares: Tensor | None  # (N,) target of every pair in a row or column

    def own_losses(self, matched: Matched) -> Tensor:  # (n,)
        """Both directions of this rank's samples, but for the targets of matching pairs."""
        own = matched.pairs.own
        losses = self.rows + own(self.columns)
        if self.shares is None or self.row_sums is None or self.column_sums is None:
            return losses
        return losses - own(self.shares) * (self.row_sums + own(self.column_sums))

    def weights(self, matched: Matched, tile: Tile) -> Tensor:  # (m, k)
        """Sum of both directions' probabilities, less the smoothed part of the targets."""
        matched.exclusion.exclude(tile)
        rows, columns = self.rows[tile.rows].unsqueeze(1), self.columns[tile.columns]
        weights = torch.sub(tile.values, rows, out=tile.scratch).exp_()
        excluded = None
        if self.shares is not None:
            own = matched.pairs.own_columns(tile.rows)
            weights -= self.shares[own].unsqueeze(1)
            weights -= self.shares[tile.columns]
            excluded = tile.values == -torch.inf if matched.exclusion else None
        weights += tile.values.sub_(columns).exp_()
        return weights if excluded is None else weights.masked_fill_(excluded, 0.0)


def _measure(matched: Matched, label_smoothing: float) -> _Softmax:
    """The statistics pass."""
    pairs = matched.pairs
    rows, columns = pairs.new_rows(-torch.inf), pairs.new_columns(-torch.inf)
    row_sums, column_sums = pairs.new_rows(0.0), pairs.new_columns(0.0)
    for tile in pairs.tiles():
        matched.exclusion.exclude(tile)
        add_logsumexp(rows[tile.rows], tile.values, 1, tile.scratch)
        add_logsumexp(columns[tile.columns], tile.values, 0, tile.scratch)
        if label_smoothing:
            kept = tile.values.masked_fill(tile.values == -torch.inf, 0.0)
            row_sums[tile.rows] += kept.sum(1)
            column_sums[tile.columns] += kept.sum(0)
    columns = pairs.merge_columns(columns, lambda shares: shares.logsumexp(0))
    if not label_smoothing:
        return _Softmax(rows, columns, None, None, None)
    column_sums = pairs.merge_columns(column_sums, lambda shares: shares.sum(0))
    shares = label_smoothing / matched.exclusion.count_kept().to(rows.dtype)
    return _Softmax(rows, columns, row_sums, column_sums, shares)
