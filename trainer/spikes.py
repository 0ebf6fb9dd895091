"""Losses that jump: told by robust statistics of the recent ones, and gone back from.

A run that has a spike goes back to a checkpoint from before it and passes over the batches around
it (Chowdhery et al. 2022, arXiv 2204.02311, section 5.1: the same batches from other weights do not
spike, so it is the pair of both that is avoided). Steps keep their batches: a batch passed over is
a step without an update, so order, clock and schedule stay what they are.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from trainer.config import SpikesConfig

_NORMAL = 1.4826  # times the median absolute deviation: a normal distribution's deviation
_LEAST_SHARE = 1e-3  # of the median: losses that hardly move are not all spikes


@dataclass(frozen=True)
class RecentLosses:
    """The losses of the last `window` steps that were no spike; part of a run's state."""

    config: SpikesConfig
    losses: tuple[float, ...] = ()

    def and_then(self, loss: float) -> "RecentLosses":
        """With one more, which was no spike."""
        if not self.config.threshold:
            return self
        return RecentLosses(self.config, (*self.losses, loss)[-self.config.window :])

    def has_spike(self, loss: float) -> bool:
        """Whether `loss` is too high to be one of them; never before there are `window`."""
        if not self.config.threshold or len(self.losses) < self.config.window:
            return False
        return deviations(self.losses, loss) > self.config.threshold


def deviations(losses: Sequence[float], loss: float) -> float:
    """How many typical deviations `loss` lies above the median of `losses`."""
    middle = statistics.median(losses)
    spread = _NORMAL * statistics.median(abs(each - middle) for each in losses)
    return (loss - middle) / max(spread, _LEAST_SHARE * abs(middle), 1e-12)


def passed_over(step: int, skip: int, already: Sequence[int]) -> tuple[int, ...]:
    """Batches (by 0-based step) to be left out after a spike in `step`: it and `skip` - 1 before.

    `already`: those of earlier spikes.
    """
    return tuple(sorted({*already, *range(max(0, step - skip + 1), step + 1)}))
