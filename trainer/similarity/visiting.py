"""How the other ranks' rows come by: all at once, or one rank's at a time round a ring.

Both visit each row of the global batch once a sweep. Gathering needs memory for all N rows and
their gradients, the ring for two ranks' rows, but sends the rows again in every sweep.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from trainer.collectives import RingShift, count_ranks, gather_rows, own_rank, return_rows


@dataclass(frozen=True)
class Visit:
    """Visiting rows that are here now."""

    columns: slice
    """Their positions among all N visiting rows."""
    rows: Tensor
    """(columns, d) in the dtype of computation."""
    gradients: Tensor | None
    """(columns, d) sums to add to, or None in a sweep without gradients."""


class Visiting(Protocol):
    """Brings every visiting row by once a sweep, and its gradient home."""

    def visits(self) -> Iterator[Visit]:
        """One sweep without gradients."""

    def visits_with_gradients(self) -> Iterator[Visit]:
        """One sweep whose `gradients` are added up over ranks at their owner."""

    def gradients(self) -> Tensor:
        """(n, d) gradients of this rank's own rows, after the sweep that summed them."""


class Gathered:
    """All ranks' rows are gathered once; gradients go home in one exchange."""

    def __init__(
        self,
        rows: Tensor,  # (n, d) this rank's, in the dtype that travels
        counts: Sequence[int],
        group: ProcessGroup | None,
        dtype: torch.dtype,
    ) -> None:
        self._counts, self._group, self._wire = counts, group, rows.dtype
        self._rows = gather_rows(rows, counts, group).to(dtype)
        self._home: Tensor | None = None

    def visits(self) -> Iterator[Visit]:
        yield Visit(slice(0, len(self._rows)), self._rows, None)

    def visits_with_gradients(self) -> Iterator[Visit]:
        sums = torch.zeros_like(self._rows, memory_format=torch.contiguous_format)
        yield Visit(slice(0, len(sums)), self._rows, sums)
        if len(self._counts) > 1:  # what one rank knows needs no rounding for a journey
            sums = return_rows(sums.to(self._wire), self._counts, self._group).sum(
                0, dtype=sums.dtype
            )
        self._home = sums

    def gradients(self) -> Tensor:
        if self._home is None:
            raise RuntimeError("no sweep with gradients has ended yet")
        return self._home


class Ring:
    """Rows go round the ranks; in a sweep with gradients, their sums travel with them.

    A rank starts with its neighbour's rows and ends with its own, so that sums are home when the
    last rank has added to them. The next rows are under way while the present ones are worked on.
    Sums travel in the dtype of computation: rounded at every hop, they would decay with the ranks.
    """

    def __init__(
        self,
        rows: Tensor,  # (n, d) this rank's, in the dtype that travels
        counts: Sequence[int],
        group: ProcessGroup,
        dtype: torch.dtype,
    ) -> None:
        self._own, self._counts, self._group, self._dtype = rows.detach(), counts, group, dtype
        self._rank, self._world_size = own_rank(group), count_ranks(group)
        self._starts = [sum(counts[:rank]) for rank in range(self._world_size)]
        self._home: Tensor | None = None

    def visits(self) -> Iterator[Visit]:
        yield from self._sweep(None)

    def visits_with_gradients(self) -> Iterator[Visit]:
        shape = self._counts[self._rank - 1], self._own.shape[1]
        yield from self._sweep(self._own.new_zeros(shape, dtype=self._dtype))

    def gradients(self) -> Tensor:
        if self._home is None:
            raise RuntimeError("no sweep with gradients has ended yet")
        return self._home

    def _sweep(self, sums: Tensor | None) -> Iterator[Visit]:
        rows = RingShift(self._own, self._counts[self._rank - 1], self._group).wait()
        for hop in range(1, self._world_size + 1):
            owner = (self._rank - hop) % self._world_size
            arriving = self._counts[owner - 1]
            coming = None
            if hop + 1 < self._world_size:
                coming = RingShift(rows, arriving, self._group)
            start = self._starts[owner]
            columns = slice(start, start + self._counts[owner])
            yield Visit(columns, rows.to(self._dtype), sums)
            if sums is not None and hop < self._world_size:
                sums = RingShift(sums, arriving, self._group, tag=1).wait()
            rows = coming.wait() if coming is not None else self._own
        self._home = sums


def build_visiting(
    visiting: str,  # "gather" or "ring"
    rows: Tensor,  # (n, d) this rank's, in the dtype that travels
    counts: Sequence[int],
    group: ProcessGroup | None,
    dtype: torch.dtype,
) -> Visiting:
    """The named way of visiting; one process has nobody to go to, so both are the same there."""
    if visiting not in ("gather", "ring"):
        raise ValueError(f"visiting={visiting!r} does not exist: choose 'gather' or 'ring'")
    if visiting == "ring" and group is not None and len(counts) > 1:
        return Ring(rows, counts, group, dtype)
    return Gathered(rows, counts, group, dtype)
