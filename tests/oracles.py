"""Naive references in float64: everything stored, a loop over rows, gradients by autograd.

Nothing outside the tests may import this, and nothing here may import what it is to judge.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def _kept(i: int, identities: Sequence[Tensor | None], count: int) -> list[int]:
    """Columns that row i sees: all but other positions with an identity equal to its own."""
    known = [x.tolist() for x in identities if x is not None]
    return [j for j in range(count) if j == i or all(x[i] != x[j] for x in known)]


def _cross_entropy(logits: Tensor, target: int, label_smoothing: float) -> Tensor:
    log_p = logits - logits.logsumexp(0)
    return -(1 - label_smoothing) * log_p[target] - label_smoothing * log_p.mean()


def clip(
    images: Tensor,
    texts: Tensor,
    scale: Tensor,
    *,
    label_smoothing: float = 0.0,
    ids: Tensor | None = None,
    caption_ids: Tensor | None = None,
) -> Tensor:
    """Radford et al. 2021, arXiv 2103.00020, figure 3: mean of both directions' cross entropies."""
    logits = scale * images @ texts.T
    total = logits.new_zeros(())
    for i in range(len(images)):
        kept = _kept(i, (ids, caption_ids), len(images))
        for line in (logits[i], logits[:, i]):
            total = total + _cross_entropy(line[kept], kept.index(i), label_smoothing) / 2
    return total.sum() / len(images)


def siglip(
    images: Tensor,
    texts: Tensor,
    scale: Tensor,
    bias: Tensor,
    *,
    ids: Tensor | None = None,
    caption_ids: Tensor | None = None,
) -> Tensor:
    """Zhai et al. 2023, arXiv 2303.15343, algorithm 1: the sum over all pairs, divided by N."""
    logits = scale * images @ texts.T + bias
    total = logits.new_zeros(())
    for i in range(len(images)):
        for j in _kept(i, (ids, caption_ids), len(images)):
            total = total - torch.nn.functional.logsigmoid(
                logits[i, j] if i == j else -logits[i, j]
            )
    return total.sum() / len(images)


def supcon(
    embeddings: Tensor, labels: Tensor, scale: Tensor, *, ids: Tensor | None = None
) -> Tensor:
    """Khosla et al. 2020, arXiv 2004.11362, equation 2; rows without a positive add 0."""
    logits = scale * embeddings @ embeddings.T
    total = logits.sum() * 0
    for i in range(len(embeddings)):
        others = [j for j in _kept(i, (ids,), len(embeddings)) if j != i]
        positives = [j for j in others if labels[j] == labels[i]]
        if positives:
            log_p = logits[i, positives] - logits[i, others].logsumexp(0)
            total = total - log_p.mean()
    return total.sum() / len(embeddings)


def multi_similarity(
    embeddings: Tensor,
    labels: Tensor,
    *,
    alpha: float = 2.0,
    beta: float = 50.0,
    threshold: float = 0.5,
    epsilon: float = 0.1,
    ids: Tensor | None = None,
) -> Tensor:
    """Wang et al. 2019, arXiv 1904.06627, equations 11 to 15, mined pairs only."""
    cosines = embeddings @ embeddings.T
    total = cosines.sum() * 0
    for i in range(len(embeddings)):
        others = [j for j in _kept(i, (ids,), len(embeddings)) if j != i]
        positives = [j for j in others if labels[j] == labels[i]]
        negatives = [j for j in others if labels[j] != labels[i]]
        if not positives or not negatives:
            continue
        least, most = cosines[i, positives].min(), cosines[i, negatives].max()
        pulled = [j for j in positives if cosines[i, j] - epsilon < most]
        pushed = [j for j in negatives if cosines[i, j] + epsilon > least]
        total = total + (1 + (-alpha * (cosines[i, pulled] - threshold)).exp().sum()).log() / alpha
        total = total + (1 + (beta * (cosines[i, pushed] - threshold)).exp().sum()).log() / beta
    return total.sum() / len(embeddings)
