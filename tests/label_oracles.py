"""Naive references of the losses of queries against labels: a loop over queries, by autograd.

Nothing outside the tests may import this, and nothing here may import what it is to judge.
`positives` is a list of label ids a query; a label id counts once, by its first row.
"""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

Lists = Sequence[Sequence[int]]


def _columns(label_ids: Sequence[int]) -> list[int]:
    """Rows that count."""
    return [j for j, x in enumerate(label_ids) if x not in label_ids[:j]]


def _each(
    logits: Tensor, positives: Lists, label_ids: Sequence[int], drawn: Sequence[int] | None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits of the positives that pull and of true negatives, of queries with a positive."""
    for i, own in enumerate(positives):
        rows = _columns(label_ids)
        pull = [j for j in rows if label_ids[j] in own and (not drawn or label_ids[j] == drawn[i])]
        push = [j for j in rows if label_ids[j] not in own]
        if pull:
            yield logits[i, pull], logits[i, push]


def decoupled(queries, labels, scale, positives, label_ids, drawn=None):
    """Gupta et al. 2024, arXiv 2310.10636: each positive against all negatives."""
    logits = scale * queries @ labels.T
    total = logits.sum() * 0
    for pull, push in _each(logits, positives, label_ids, drawn):
        for z in pull:
            total = total + (torch.cat([z[None], push]).logsumexp(0) - z) / len(pull)
    return total / max(len(queries), 1)


def one_vs_all(queries, labels, scale, bias, positives, label_ids):
    """The sum of the binary cross entropies of all labels."""
    logits = scale * queries @ labels.T
    if bias is not None:
        logits = logits + bias.reshape(())
    total = logits.sum() * 0
    for pull, push in _each(logits, positives, label_ids, None):
        total = total - torch.nn.functional.logsigmoid(torch.cat([pull, -push])).sum()
    return total / max(len(queries), 1)


def topk_hinge(
    queries,
    labels,
    scale,
    positives,
    label_ids,
    drawn=None,
    margin=0.3,
    k=10,
    softmax_temperature=None,
):
    """Dahiya et al. 2023, WSDM, equation 1, over k terms of which missing ones are 0."""
    logits = scale * queries @ labels.T
    total = logits.sum() * 0
    for pull, push in _each(logits, positives, label_ids, drawn):
        hardest = push.sort(descending=True).values[:k]
        for z in pull:
            hinges = (hardest - z + margin).clamp(min=0)
            weights = torch.full((len(hardest),), 1 / k, dtype=logits.dtype)
            if softmax_temperature is not None:
                powers = [
                    math.exp(s / softmax_temperature) if h > 0 else 1.0
                    for s, h in zip(hardest.tolist(), hinges.tolist(), strict=True)
                ]
                whole = sum(powers) + k - len(powers)
                weights = torch.tensor(powers, dtype=logits.dtype) / whole
            total = total + (weights * hinges).sum() / len(pull)
    return total / max(len(queries), 1)


def soft_topk(queries, labels, scale, positives, label_ids, drawn=None, k=0, alpha=2.0):
    """Gupta et al. 2024: the root by bisection; one Newton's step makes it differentiable."""
    logits = scale * queries @ labels.T
    total = logits.sum() * 0
    for pull, push in _each(logits, positives, label_ids, drawn):
        wanted, z = k or len(pull), torch.cat([pull, push])
        if wanted == len(z):
            continue
        known = z.detach()
        low, high = -float(known.max()) - 100 / alpha, -float(known.min()) + 100 / alpha
        for _ in range(80):
            t = (low + high) / 2
            if torch.sigmoid(alpha * (known + t)).sum() < wanted:
                low = t
            else:
                high = t
        passing = torch.sigmoid(alpha * (z + t))
        t = t - (passing.sum() - wanted) / (alpha * passing * (1 - passing)).sum().detach()
        total = total - torch.nn.functional.logsigmoid(alpha * (pull + t)).mean()
    return total / max(len(queries), 1)
