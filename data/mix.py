"""Several sources by weight: global position -> source and its own position, in closed form.

Places 0, 1, ... of a cycle of 65,536 visit the residues of a multiplicative (Kronecker) sequence,
and a source owns as many consecutive residues as its weight says. So its share of any run of places
(a global batch, one rank's rows of it) is within a few samples of the weight; over a cycle, exact.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from data.order import BatchOf

Int64s = NDArray[np.int64]

CYCLE = 1 << 16
_STRIDE = 40503  # odd and next to CYCLE / golden ratio: the most even spread of any run of places


class Mix:
    """Which source each global position reads, and at which of its own positions."""

    def __init__(self, weights: Sequence[float]) -> None:
        shares = cycle_shares(weights)
        residues = np.arange(CYCLE) * _STRIDE % CYCLE
        self._sources = np.searchsorted(np.cumsum(shares), residues, side="right")
        self._shares = shares
        # Places of each source in a cycle, and each place's number among those of its source.
        self._places = [np.flatnonzero(self._sources == source) for source in range(len(shares))]
        self._ranks = np.zeros(CYCLE, np.int64)
        for places in self._places:
            self._ranks[places] = np.arange(len(places))

    @property
    def num_sources(self) -> int:
        """How many sources are mixed."""
        return len(self._shares)

    def split(
        self,
        positions: Int64s,  # (n,) global
    ) -> tuple[Int64s, Int64s]:  # (n,) sources, (n,) positions in the source
        """Source of each global position and its count of earlier samples from that source."""
        cycles, places = np.divmod(positions, CYCLE)
        sources = self._sources[places]
        return sources, cycles * self._shares[sources] + self._ranks[places]

    def taken(self, source: int, position: int) -> int:
        """Samples of `source` among the first `position` global ones."""
        return int(self.taken_before(source, np.array([position]))[0])

    def taken_before(
        self,
        source: int,
        positions: Int64s,  # (n,) global
    ) -> Int64s:  # (n,)
        """The same for each of many positions."""
        cycles, places = np.divmod(positions, CYCLE)
        before = np.searchsorted(self._places[source], places)
        return cycles * self._shares[source] + before

    def largest_quota(self, source: int, global_batch_size: int) -> int:
        """The most samples of `source` that any global batch of this size takes."""
        places = self._places[source]
        cycles, rest = divmod(global_batch_size, CYCLE)
        ends = np.searchsorted(np.concatenate([places, places + CYCLE]), places + rest)
        most = int((ends - np.arange(len(places))).max()) if rest else 0
        return cycles * len(places) + most

    def batch_of(self, source: int, global_batch_size: int) -> BatchOf:
        """Positions of `source` in the global batch that holds a given one of them."""
        places = self._places[source]

        def batch_of(position: int) -> tuple[int, int]:
            cycle, rank = divmod(position, len(places))
            step = (cycle * CYCLE + int(places[rank])) // global_batch_size
            start = step * global_batch_size
            return self.taken(source, start), self.taken(source, start + global_batch_size)

        return batch_of


def cycle_shares(weights: Sequence[float]) -> Int64s:
    """Weights as whole shares of a cycle, largest remainders first; at least one each."""
    if not weights or not all(np.isfinite(weight) and weight > 0 for weight in weights):
        raise ValueError(f"weights must be positive and finite, got {list(weights)}")
    exact = np.array(weights, np.float64) / sum(weights) * CYCLE
    shares = np.maximum(1, np.floor(exact)).astype(np.int64)
    order = np.argsort(shares - exact, kind="stable")
    missing = CYCLE - int(shares.sum())
    shares[order[: max(0, missing)]] += 1
    shares[np.argmax(shares)] += min(0, missing)
    return shares
