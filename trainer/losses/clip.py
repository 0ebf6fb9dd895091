"""Symmetric softmax loss of CLIP over all ranks' pairs."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from trainer.losses.matched import Matched, match
from trainer.similarity.closed_form import attach_gradients, needs_gradient, plain_arithmetic
from trainer.similarity.pairs import Tile
from trainer.similarity.softmax import measure_softmax


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
        smoothing = _Smoothing(matched, label_smoothing)
        softmax = measure_softmax(matched.pairs, smoothing.sweep())
        target = 2 * (1 - label_smoothing)  # of a matching pair, in both directions
        rows, columns = softmax.logsumexps()
        losses = rows + matched.pairs.own(columns) - target * matched.own_logits()
        value = (losses - smoothing.terms()).sum() * (matched.share / 2)
        if not any(needed):
            return value

        def weights(now: Tile) -> Tensor:
            matched.exclusion.exclude(now)
            targets = smoothing.targets(now)
            probabilities = softmax.probabilities(now)
            return probabilities if targets is None else probabilities.sub_(targets)

        gradients = matched.gradients(weights, -target, needed, mean=matched.share / 2)
    return attach_gradients(value, inputs, gradients)


class _Smoothing:
    """The part of the targets that is spread over all pairs of a row or column, if any."""

    def __init__(self, matched: Matched, label_smoothing: float) -> None:
        self._matched, self._pairs = matched, matched.pairs
        self._row_sums, self._column_sums = self._pairs.new_rows(0.0), self._pairs.new_columns(0.0)
        self._shares: Tensor | None = None  # (N,) the target of each pair
        if label_smoothing:
            self._shares = label_smoothing / matched.exclusion.count_kept().to(self._pairs.dtype)

    def sweep(self) -> Iterator[Tile]:
        """All tiles with excluded pairs at -inf; the logits of the others are summed on the way."""
        for tile in self._pairs.tiles():
            self._matched.exclusion.exclude(tile)
            if self._shares is not None:
                kept = tile.values.masked_fill(tile.values == -torch.inf, 0.0)
                self._row_sums[tile.rows] += kept.sum(1)
                self._column_sums[tile.columns] += kept.sum(0)
            yield tile

    def terms(self) -> Tensor:  # (n,)
        """Targets times logits, summed over both directions of this rank's samples."""
        if self._shares is None:
            return self._row_sums
        columns = self._pairs.merge_columns(self._column_sums, lambda shares: shares.sum(0))
        return self._pairs.own(self._shares) * (self._row_sums + self._pairs.own(columns))

    def targets(self, tile: Tile) -> Tensor | None:  # (m, k)
        """The targets of both directions, none for excluded pairs."""
        if self._shares is None:
            return None
        own = self._shares[self._pairs.own_columns(tile.rows)]
        targets = own.unsqueeze(1) + self._shares[tile.columns]
        return targets.masked_fill_(tile.values == -torch.inf, 0.0)
