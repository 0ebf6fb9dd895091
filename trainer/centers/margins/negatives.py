"""Negatives: cosines of a tile become logits in place; likely false ones may be filtered."""

from typing import Protocol

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
        self._minus_infinity = filter == "drop" and normalised

    def __call__(
        self,
        cosines: Tensor,  # (m, k) of m centers with the samples at `columns`; becomes the logits
        columns: slice,
    ) -> Tensor | None:  # (m, k)
        """Logits times scale in place; returns dlogit/dcosine, None where that is `scale`.

        Entries of targets become something, which the caller overwrites. A slope does not matter
        where the logit is -inf, so "drop" alone still returns None.
        """
        # Arithmetic with 0 and 1: masked_fill is several times slower on a CPU.
        kept = None if self._filter == "none" else (cosines <= self._threshold).to(cosines.dtype)
        slopes = None if self._rule is None else self._rule(cosines, columns).mul_(self._scale)
        cosines.mul_(self._scale)
        if kept is None:
            return slopes
        if slopes is not None:
            slopes.mul_(kept)
        if self._minus_infinity:
            cosines.add_(1 - kept.reciprocal_())
            return slopes
        cosines.mul_(kept)
        return kept.mul_(self._scale) if slopes is None else slopes
