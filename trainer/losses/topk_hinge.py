"""NGAME's hinge: queries against the k hardest labels that are not theirs."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from trainer.losses.listed import Inputs, Listed, Positives, list_pairs
from trainer.similarity.closed_form import attach_gradients, needs_gradient, plain_arithmetic
from trainer.similarity.pairs import Tile
from trainer.similarity.topk import TopK, measure_topk


def topk_hinge_loss(  # noqa: PLR0913 - a loss's inputs, and its own options
    queries: Tensor,  # (n, d) unit rows, this rank's; n may differ from rank to rank
    labels: Tensor,  # (m, d) unit rows, this rank's; m may differ from rank to rank
    scale: Tensor,  # () or (1,) multiplier of the cosines; 1 as published
    positives: Positives,
    label_ids: Tensor,  # (m,) int global ids of the label rows
    group: ProcessGroup | None = None,
    *,
    margin: float = 0.3,
    k: int = 10,
    softmax_temperature: float | None = None,
    drawn: Tensor | None = None,  # (n,) int the one positive that pulls, -1: none; None: all
    row_weights: Tensor | None = None,  # (n,) of the queries' losses; None: all 1
    labels_are_parts: bool = False,
    tile: int | None = None,
) -> Tensor:  # () this rank's mean over its n queries
    """Mean over the k hardest negatives of max(s_negative - s_positive + margin, 0).

    Dahiya et al. 2023 (NGAME), WSDM, equation 1 and its released defaults; s is scale * cosine and
    `margin` is of its size. The mean has k terms, also where hinges are inactive (a hinge of
    exactly 0 is), and where fewer than k negatives exist: 0 stands for them, never a positive.
    With several positives it is the mean over them. Of equally hard negatives at the edge of the k
    some are taken.

    With `softmax_temperature` the terms are weighed, instead of by 1/k, by a softmax over the k of
    s_negative / temperature, 0 for those that violate nothing; no gradient goes through weights.

    Ranks, masks, weights, gradients and `labels_are_parts` as in `decoupled_loss`. One sweep,
    2 N L d / W FLOPs: gradients have k + 1 pairs a query. Ranks exchange O(N k) numbers.
    """
    if k < 1:
        raise ValueError(f"k={k}: give the number of hardest negatives, at least 1")
    if softmax_temperature is not None and not softmax_temperature > 0:
        raise ValueError(f"softmax_temperature={softmax_temperature}: give one above 0, or None")
    inputs = (queries, labels, scale)
    needed = needs_gradient(*inputs)
    with plain_arithmetic(queries.device):
        listed = list_pairs(
            Inputs(queries, labels, scale, positives, label_ids, drawn, row_weights),
            group,
            labels_are_parts=labels_are_parts,
            tile=tile,
            swept_once=True,
        )
        hinges = _measure(listed, margin, k, softmax_temperature)
        value = listed.mean(hinges.losses)
        if not any(needed):
            return value
        sums = listed.pairs.sparse_gradients(*hinges.weights(), visitors=needed[0] or needed[2])
        gradients = listed.scaled(*sums, needed)
    return attach_gradients(value, inputs, gradients)


@dataclass(frozen=True)
class _Hinges:
    """Losses, and the pair weights of the negatives and positives that take part."""

    listed: Listed
    hardest: TopK
    losses: Tensor  # (N,)
    pushes: Tensor  # (N, k) weights of the hardest negatives
    pulls: Tensor  # (p,)

    def weights(self) -> tuple[Tensor, Tensor, Tensor]:  # (a,), (a,), (a,)
        """Rows, columns and dloss/dlogit of this rank's pairs."""
        listed, first = self.listed, self.listed.first_name
        rows = self.hardest.rows
        own = (rows >= first) & (rows < first + listed.pairs.num_rows) & (self.pushes > 0)
        queries = own.nonzero()[:, 0]
        return (
            torch.cat([rows[own] - first, listed.positives.rows]),
            torch.cat([queries, listed.positives.columns]),
            torch.cat([self.pushes[own], -self.pulls]),
        )


def _measure(listed: Listed, margin: float, k: int, temperature: float | None) -> _Hinges:
    """The sweep for the k hardest, then each positive against them."""
    pairs, logits = listed.pairs, listed.pairs.new_values(len(listed.positives))

    def negatives_only() -> Iterator[Tile]:
        for tile in pairs.tiles():
            listed.take_positives(tile, logits)
            yield tile

    hardest = measure_topk(pairs, negatives_only(), k, listed.first_name)
    values = listed.per_positive(hardest.values)  # (p, k)
    hinges = (values - logits.unsqueeze(1) + margin).clamp_(min=0)
    if temperature is None:
        weights = torch.full_like(hinges, 1 / k)
    else:
        weights = (values / temperature).masked_fill_(hinges == 0, 0.0).softmax(dim=1)
    active = weights * (hinges > 0)
    terms = torch.cat([active, (weights * hinges).sum(1, keepdim=True)], dim=1)
    merged = listed.mean_over_positives(terms)
    return _Hinges(listed, hardest, merged[:, k], merged[:, :k], listed.pulls(active.sum(1)))
