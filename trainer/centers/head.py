"""The loss of one step: embeddings gathered, target cosines, the first sweep, ranks combined.

The semantics are those of reference/faces.md section 5; each number that a margin needs (target
cosines, norms) is of the global batch and equal on every rank.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.distributed import ProcessGroup

from trainer.centers.margins import Margin, Margined, Targets
from trainer.centers.stream import SHORTEST, Places, Sweeps, UnitRows, tile_of
from trainer.collectives import (
    count_ranks,
    gather_counts,
    gather_rows,
    max_over_ranks,
    own_rank,
    return_rows,
    sum_over_ranks,
)
from trainer.similarity.pairs import Pairs


class Chosen(NamedTuple):
    """The centers of this rank that take part in a step."""

    rows: UnitRows
    own_classes: NDArray[np.int64]  # (N,) place of each sample's class among them, -1: not here
    log_weights: Tensor | None  # (m,) log of how many classes each class stands for


class GlobalBatch(NamedTuple):
    """What every rank knows of every sample: a few numbers each."""

    labels: NDArray[np.int64]  # (N,)
    sample_ids: Tensor  # (N,)
    norms: Tensor  # (N,) of the embeddings
    counts: list[int]  # samples of each rank
    own: slice  # this rank's samples

    @property
    def size(self) -> int:
        """N."""
        return len(self.labels)


@dataclass
class Measured:
    """A loss, and what the second sweep needs for the centers' gradient."""

    value: Tensor  # () this rank's mean
    gradient: Tensor  # (n, d) dvalue/dembeddings
    rows: UnitRows
    sweeps: Sweeps
    logsumexps: Tensor  # (N,)
    target_weights: Tensor  # (N,) dloss_i/dcosine of the own class
    share: float  # of a sample in the global loss: 1 / N
    target_cosine: Tensor  # () mean over the global batch
    margined: Tensor  # (n,) this rank's target logits, with the margin
    upstream: Tensor | None = None

    def receive(self, upstream: Tensor) -> None:
        """The backward pass tells how much this loss counts in what is minimised."""
        self.upstream = upstream.detach()


def gather_batch(
    embeddings: Tensor,  # (n, d)
    labels: Tensor,  # (n,)
    sample_ids: Tensor | None,
    num_classes: int,
    group: ProcessGroup | None,
) -> GlobalBatch:
    """Labels, ids and norms from all ranks; every rank refuses what any rank cannot use."""
    device = embeddings.device
    counts = gather_counts(len(labels), group, device)
    if sum(counts) == 0:
        raise ValueError("the global batch is empty: no rank has a sample")
    start = sum(counts[: own_rank(group)])
    own = slice(start, start + len(labels))
    if sample_ids is None:
        sample_ids = torch.arange(own.start, own.stop)
    numbers = torch.stack([labels.to(device).long(), sample_ids.to(device).long()], dim=1)
    everyone = gather_rows(numbers, counts, group)
    norms = torch.linalg.vector_norm(embeddings, dim=1).clamp_(min=SHORTEST)
    known = everyone[:, 0].cpu().numpy()
    outside = (known < 0) | (known >= num_classes)
    if outside.any():
        raise ValueError(
            f"label {known[outside][0]} of sample {int(everyone[outside.argmax(), 1])} is not in "
            f"[0, {num_classes}): number the classes from 0, or raise num_classes"
        )
    return GlobalBatch(known, everyone[:, 1], gather_rows(norms, counts, group), counts, own)


def measure(
    embeddings: Tensor,  # (n, d) in the dtype of computation
    batch: GlobalBatch,
    chosen: Chosen,
    margin: Margin,
    group: ProcessGroup | None,
    *,
    step: int,
    subcenters: int,
    wire: torch.dtype,
    training: bool,
) -> Measured:
    """The first sweep and all that ranks tell each other: O(N) numbers, and embeddings once."""
    unit = embeddings / batch.norms[batch.own].unsqueeze(1)
    tile = tile_of(embeddings.device, subcenters)
    pairs = Pairs(chosen.rows, unit.to(wire), group, tile=tile, swept_once=True)
    targets = _Targets.find(chosen, pairs, subcenters)
    cosines = sum_over_ranks(targets.cosines, group)
    margined = margin.prepare(
        Targets(cosines, batch.norms, batch.sample_ids, step), training=training
    )
    sweeps = Sweeps(
        pairs=pairs,
        margined=margined,
        places=Places(chosen.own_classes, tile // subcenters, tile, embeddings.device),
        log_weights=chosen.log_weights,
        scale=margin.scale,
        normalised=margin.normalised,
        subcenters=subcenters,
    )
    shifts, sums, directions = sweeps.add_negatives()
    if margin.normalised:
        losses, logsumexps, slack = _normalise(shifts, sums, directions, margined, group)
    else:
        losses, logsumexps = sum_over_ranks(sums, group) - margined.logits, shifts
        slack = torch.full_like(losses, -1.0)
    target_weights = slack * margined.slopes
    directions[targets.samples] += target_weights[targets.samples].unsqueeze(1) * targets.units
    norm_weights = _norm_weights(slack, margined)[batch.own]
    if margined.penalty is not None:
        losses = losses + margined.penalty
    share = count_ranks(group) / batch.size
    home = return_rows(directions.to(wire), batch.counts, group).sum(0, dtype=directions.dtype)
    along = (home * unit).sum(1, keepdim=True)
    gradient = (home - unit * along) / batch.norms[batch.own].unsqueeze(1)
    gradient += unit * norm_weights.unsqueeze(1)
    return Measured(
        value=losses[batch.own].sum() * share,
        gradient=gradient * share,
        rows=chosen.rows,
        sweeps=sweeps,
        logsumexps=logsumexps,
        target_weights=target_weights,
        share=1 / batch.size,
        target_cosine=cosines.mean(),
        margined=margined.logits[batch.own],
    )


class _Targets(NamedTuple):
    """Samples whose class is on this rank, with the center (the nearest sub-center) of each."""

    samples: Tensor  # (h,) among all N
    units: Tensor  # (h, d)
    cosines: Tensor  # (N,), 0 for samples of other ranks' classes

    @classmethod
    def find(cls, chosen: Chosen, pairs: Pairs, subcenters: int) -> "_Targets":
        visitors = pairs.visitors()
        here = np.flatnonzero(chosen.own_classes >= 0)
        samples = torch.from_numpy(here).to(visitors.device)
        first = torch.from_numpy(chosen.own_classes[here] * subcenters).to(visitors.device)
        each = torch.arange(subcenters, device=visitors.device)
        units = chosen.rows.read_at((first.unsqueeze(1) + each).flatten())
        units = units.view(len(here), subcenters, units.shape[1])
        found = (units * visitors[samples].unsqueeze(1)).sum(2)
        best = found.argmax(1)
        cosines = visitors.new_zeros(len(visitors))
        cosines[samples] = found.gather(1, best.unsqueeze(1)).squeeze(1)
        return cls(samples, units[torch.arange(len(here), device=best.device), best], cosines)


def _normalise(
    shifts: Tensor,
    sums: Tensor,
    directions: Tensor,  # (N, d) scaled in place: by sample, into sums of softmax times slope
    margined: Margined,
    group: ProcessGroup | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropies, log-sum-exps over all classes, and dloss/dtarget logit."""
    top = max_over_ranks(shifts, group)
    total = sum_over_ranks(sums * torch.exp(shifts - top), group)
    logsumexps = torch.logaddexp(top + total.log(), margined.logits)
    directions *= torch.exp(shifts - logsumexps).unsqueeze(1)
    # 1 - p of the target without cancellation: p near 1 is where training ends up.
    slack = torch.expm1(margined.logits - logsumexps)
    return logsumexps - margined.logits, logsumexps, slack


def _norm_weights(slack: Tensor, margined: Margined) -> Tensor:
    """dloss/dnorm of each embedding, of losses whose margin looks at it."""
    weights = torch.zeros_like(slack)
    if margined.norm_slopes is not None:
        weights += slack * margined.norm_slopes
    if margined.penalty_slopes is not None:
        weights += margined.penalty_slopes
    return weights
