"""The controller of `[negatives]`: halves or doubles the cluster size to keep hardness in a band.

What is kept in the band is the share of sampled rows whose hardest negative comes closer than the
positive. A decision falls when a plan is made and from whole counts alone; it is stored with the
plan, so a replay reads it and decides nothing anew.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Self

from trainer.config import ConfigError

MIN_ROWS = 64  # sampled rows without which nothing is decided: one measured step of them


@dataclass(frozen=True)
class Decision:
    """The cluster size of the next plan and what it was decided from; goes into its header."""

    cluster_size: int
    was: int
    rows: int
    """Sampled rows that were measured under `was`."""
    closer: int
    """Of them, those whose hardest negative came closer than the positive."""
    band: tuple[float, float]

    @property
    def share(self) -> float:
        """NaN where nothing was measured."""
        return self.closer / self.rows if self.rows else math.nan

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "band": list(self.band)}


@dataclass(frozen=True)
class Control:
    """Hardness under the present cluster size since it was decided; part of every checkpoint."""

    cluster_size: int
    rows: int = 0
    closer: int = 0

    def observe(
        self,
        numbers: Mapping[str, float],  # of `Hardness.numbers()`, of one logged step
        cluster_size: int,  # of the plan that the step's batch was from; 1: random
    ) -> Self:
        """With one more measured step; one of a plan that is on its way out does not count."""
        rows, share = numbers.get("hardness_rows", 0), numbers.get("closer_than_positive", math.nan)
        if cluster_size != self.cluster_size or not rows or not math.isfinite(share):
            return self
        return replace(self, rows=self.rows + int(rows), closer=self.closer + round(share * rows))

    def to_json(self) -> dict[str, int]:
        """Plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, tree: Mapping[str, Any]) -> Self:
        """Take over `to_json()`. Raises ConfigError for what it cannot have written."""
        names = {field.name for field in fields(cls)}
        whole = all(isinstance(value, int) and value >= 0 for value in tree.values())
        if {*tree} != names or not whole or not 0 <= tree["closer"] <= tree["rows"]:
            raise ConfigError(
                f"the checkpoint's controller state is {dict(tree)}: whole numbers "
                f"{', '.join(sorted(names))} are wanted; resume from an older checkpoint"
            )
        return cls(**tree)


def decide(
    control: Control,
    *,
    band: tuple[float, float],
    batch_size: int,  # the global batch: a larger cluster could not meet
) -> tuple[Decision, Control]:
    """The next plan's cluster size and the history that begins with it; a pure function.

    Doubled where the share is below the band, halved where it is above, within [1, batch_size];
    as it is inside the band and where fewer than MIN_ROWS rows were measured. Raises ConfigError
    for a band that is none.
    """
    low, high = band
    if not 0 <= low < high <= 1:
        raise ConfigError(
            f"negatives.band = [{low}, {high}]: a lower and a higher share within [0, 1], such as "
            "[0.02, 0.2]"
        )
    size = min(max(control.cluster_size, 1), batch_size)
    if control.rows >= MIN_ROWS:
        share = control.closer / control.rows
        if share < low:
            size = min(size * 2, batch_size)
        elif share > high:
            size = max(size // 2, 1)
    decision = Decision(size, control.cluster_size, control.rows, control.closer, (low, high))
    return decision, Control(size)
