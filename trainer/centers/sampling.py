"""Which centers take part in a step: those of the batch's identities, hard ones, and random ones.

The classes are cut into blocks of a fixed size, and each block's random negatives are the first of
a keyed permutation of it: a function of (seed, step, block) that no rank count changes. A rank
that owns a part of a block draws all of it and keeps what is its own.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data.order import derive_key, permute
from trainer.centers.parts import Part

BLOCK = 2**16  # classes drawn together: at most two blocks a rank are drawn in vain
_NEGATIVES = 16  # what the key is for; the data order's and substitutes' are below

Int64s = NDArray[np.int64]


@dataclass(frozen=True)
class Sample:
    """Classes of one part that take part in a step."""

    classes: Int64s
    """(m,) local class numbers, rising."""
    log_weights: NDArray[np.float64]
    """(m,) log of how many classes each stands for: 0 but for random negatives."""

    def to(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Both as tensors."""
        classes = torch.from_numpy(self.classes).to(device)
        return classes, torch.from_numpy(self.log_weights).to(device, dtype)


def sample_classes(
    part: Part,
    positives: Int64s,  # (p,) distinct global classes of the global batch, rising
    sample_rate: float,
    *,
    seed: int,
    step: int,
    hard: Int64s | None = None,  # (h,) distinct global classes, the most wanted first
    hard_share: float = 0.0,
    weighed: bool = True,  # False: nobody reads `log_weights`, so none need be stood for
) -> Sample:
    """All positives, and of each block's other classes as many as `sample_rate` leaves room for.

    A block of n classes has floor(rate * its end) - floor(rate * its start) places, so that the
    whole is floor(rate * C). Where positives take most of them, the sample grows: none is dropped,
    and no fewer random ones are drawn than half of the rate's share of the others, `weighed` one at
    least, or nothing would stand for these.
    A random negative stands for (others / drawn) classes: the sum over sampled negatives of
    exp(log_weight) * f is an unbiased estimate of the sum of f over all (Horvitz and Thompson
    1952); hard ones are sure to be taken and stand for themselves.
    """
    found: list[Int64s] = []
    weights: list[NDArray[np.float64]] = []
    for first in range(part.start // BLOCK * BLOCK, part.stop, BLOCK):
        end = min(first + BLOCK, part.num_classes)
        places = int(sample_rate * end) - int(sample_rate * first)
        sure = positives[(positives >= first) & (positives < end)]
        if hard is not None and hard_share:
            sure = _with_hard(sure, hard, first, end, int(hard_share * (places - len(sure))))
        share = int(sample_rate * (end - first - len(sure))) // 2
        count = max(places - len(sure), share, int(weighed))
        drawn = _draw(first, end, sure, count, seed, step)
        weight = np.log((end - first - len(sure)) / len(drawn)) if len(drawn) else 0.0
        classes = np.concatenate([sure, drawn])
        log_weights = np.repeat([0.0, weight], [len(sure), len(drawn)])
        order = np.argsort(classes)
        found.append(classes[order])
        weights.append(log_weights[order])
    classes = np.concatenate([np.zeros(0, np.int64), *found])
    own = (classes >= part.start) & (classes < part.stop)
    return Sample(classes[own] - part.start, np.concatenate([np.zeros(0), *weights])[own])


def _with_hard(sure: Int64s, hard: Int64s, first: int, end: int, room: int) -> Int64s:
    """Positives and the most wanted of the block's hard negatives, rising."""
    here = hard[(hard >= first) & (hard < end)]
    here = here[~np.isin(here, sure)][: max(0, room)]
    return np.union1d(sure, here)


def _draw(first: int, end: int, sure: Int64s, count: int, seed: int, step: int) -> Int64s:
    """`count` distinct classes of the block that are not sure anyway."""
    # At most len(sure) of the permutation's first values are sure ones: enough are left.
    key = derive_key(seed, _NEGATIVES, step, first // BLOCK)
    size = end - first
    looked_at = np.arange(min(size, count + len(sure)), dtype=np.int64)
    drawn = first + permute(looked_at, np.array([size], np.int64), key)
    return drawn[~np.isin(drawn, sure)][:count]
