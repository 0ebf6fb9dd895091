"""Negatives: cosines of a tile become logits in place; likely false ones may be filtered."""

from typing import Protocol

import torch
from torch import Tensor


class NegativeRule(Protocol):
    """A family's own way with negatives."""

    def __call__(self, cosines: Tensor, columns: slice) -> Tensor:
        """Bend (m, k) cosines in place; return (m, k) slopes. Columns are places among the N."""


class Negatives:
    """Turns cosines of negatives into logits.

    A filtered negative (cosine above `threshold`: likely the same person under two labels) is left
    out by "drop", or keeps a constant logit of 0 by "zero", as insightface's inter-class filter.
    """

    def __init__(
        self,
        scale: float,
        rule: NegativeRule | None,
        *,
        filter: str,
        threshold: float,
        normalised: bool,
    ) -> None:
        self._scale, self._rule = scale, rule
        self._filter, self._threshold = filter, threshold
        # What is left out adds nothing to a normaliser, which is -inf, or to a sum, which is 0.
        self._left_out = -torch.inf if filter == "drop" and normalised else 0.0

    def __call__(
        self,
        cosines: Tensor,  # (m, k) of m centers with the samples at `columns`; becomes the logits
        columns: slice,
    ) -> Tensor | None:  # (m, k)
        """Logits times scale in place; returns dlogit/dcosine, None where that is `scale`.

        Entries of targets become something, which the caller overwrites. A slope does not matter
        where the logit is -inf, so "drop" alone still returns None.
        """
        excluded = None if self._filter == "none" else cosines > self._threshold
        slopes = None if self._rule is None else self._rule(cosines, columns).mul_(self._scale)
        cosines.mul_(self._scale)
        if excluded is None:
            return slopes
        cosines.masked_fill_(excluded, self._left_out)
        if slopes is None and self._left_out == 0.0:
            slopes = torch.full_like(cosines, self._scale)
        return slopes if slopes is None else slopes.masked_fill_(excluded, 0.0)
