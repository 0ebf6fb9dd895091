"""How long the centers of a checkpoint are."""

from collections.abc import Callable
from typing import NamedTuple

import torch

from trainer.centers.files import StoredCenters


class Lengths(NamedTuple):
    """Of all centers, each sub-center its own."""

    least: float
    mean: float
    largest: float


def measure_lengths(
    stored: StoredCenters, progress: Callable[[int, int], None] | None = None
) -> Lengths:
    """One pass over the centers as they are at the present, a block at a time."""
    least, total, largest = float("inf"), 0.0, 0.0
    for first, rows in stored.present():
        lengths = torch.linalg.vector_norm(rows.double(), dim=1)
        least, largest = min(least, float(lengths.min())), max(largest, float(lengths.max()))
        total += float(lengths.sum())
        if progress is not None:
            progress(first + len(rows) // stored.subcenters, stored.num_classes)
    return Lengths(least, total / (stored.num_classes * stored.subcenters), largest)
