"""Which rank owns which classes: C // W of them each, one more on each of the first C % W ranks."""

from dataclasses import dataclass
from typing import Self


@dataclass(frozen=True)
class Part:
    """Classes [start, stop) of `num_classes`, held by one rank."""

    start: int
    stop: int
    num_classes: int

    @classmethod
    def of_rank(cls, num_classes: int, rank: int, world_size: int) -> Self:
        """The part of global rank `rank`: parts differ by one class at most, and may be empty."""
        size, longer = divmod(num_classes, world_size)
        start = rank * size + min(rank, longer)
        return cls(start, start + size + (rank < longer), num_classes)

    def __len__(self) -> int:
        return self.stop - self.start
