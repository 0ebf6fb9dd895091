"""Pairs that are not negatives: the same sample or an equal caption twice in a global batch."""

from collections.abc import Sequence

import torch
from torch import Tensor

from trainer.similarity.pairs import Pairs, Tile


class Exclusion:
    """Equal identities at different positions are taken out of the loss.

    Identities are gathered (8 bytes a row) and sorted once; when all are distinct, and in tiles
    without a repeated one, nothing is compared at all.
    """

    def __init__(
        self,
        pairs: Pairs,  # row i of this rank belongs to its visitor i
        identities: Sequence[Tensor | None],  # each (n,) int; None: not given
    ) -> None:
        self._pairs = pairs
        self._repeated: list[tuple[Tensor, Tensor]] = []  # (N,) identities, (N,) bool
        for given in identities:
            if given is None:
                continue
            everyone = pairs.gather(given)
            repeated = _multiplicity(everyone) > 1
            if repeated.any():
                self._repeated.append((everyone, repeated))

    def __bool__(self) -> bool:
        return bool(self._repeated)

    def exclude(self, tile: Tile) -> None:
        """Set excluded pairs of the tile to -inf; a row's own visitor always stays."""
        own = self._pairs.own_columns(tile.rows)
        for identities, repeated in self._repeated:
            if repeated[own].any() and repeated[tile.columns].any():
                equal = identities[own].unsqueeze(1) == identities[tile.columns]
                tile.own_pairs(equal).fill_(False)
                tile.values.masked_fill_(equal, -torch.inf)

    def count_kept(self) -> Tensor:  # (N,) int64
        """Visitors left to each row, its own included; the same of rows left to each visitor."""
        total = self._pairs.num_columns
        kept = torch.full((total,), total, dtype=torch.int64, device=self._pairs.device)
        if not self._repeated:
            return kept
        known = [identities for identities, _ in self._repeated]
        equal = sum(map(_multiplicity, known[1:]), _multiplicity(known[0]))
        if len(known) > 1:  # equal in both was counted twice
            equal = equal - _multiplicity(torch.stack(known, dim=1))
        return kept - equal + 1


def _multiplicity(identities: Tensor) -> Tensor:  # (N,) or (N, 2) -> (N,)
    """How often each identity occurs."""
    _, inverse, counts = torch.unique(
        identities, return_inverse=True, return_counts=True, dim=0 if identities.ndim > 1 else None
    )
    return counts[inverse]
