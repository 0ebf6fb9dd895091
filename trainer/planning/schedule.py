"""When plans begin and when they are asked for: pure functions of the configuration and the step.

An epoch always begins a plan of its own. With `negatives.refresh` in whole epochs every so many of
them are clustered anew and those between shuffle the last one's clusters; in steps, a new plan also
begins inside the epoch, for the samples that are left in it.
"""

from dataclasses import dataclass
from typing import NamedTuple

from data.config import NegativesConfig
from trainer.config import ConfigError
from trainer.duration import Duration


class Switch(NamedTuple):
    """Positions [start, stop) get a plan of their own."""

    version: int
    """Counts from 0; names the plan."""
    start: int
    stop: int
    epoch: int
    asked_step: int
    """Steps done when the plan is asked for."""
    fresh: bool
    """From embeddings; else the clusters of the plan before, shuffled."""

    @property
    def name(self) -> str:
        """Folder of the plan."""
        return f"plan-{self.version:06d}"


@dataclass(frozen=True)
class Schedule:
    """The switches of a run, in order; none for the random planner."""

    switches: tuple[Switch, ...]
    first: int
    """Position of the first plan; before it samples come in the plain order."""

    @classmethod
    def build(
        cls, config: NegativesConfig, *, batch_size: int, num_samples: int, total_steps: int
    ) -> "Schedule":
        """Raises ConfigError for durations that are none."""
        refresh = read_duration(config.refresh, "refresh")
        lead = read_duration(config.lead, "lead").to_steps(batch_size, num_samples)
        end = total_steps * batch_size
        first = config.start_epoch * num_samples
        if config.planner == "random":
            return cls((), end)
        every_epochs, every_steps = 0, 0
        if refresh.unit == "epochs" and refresh.value == round(refresh.value) > 0:
            every_epochs = round(refresh.value)
        else:
            every_steps = refresh.to_steps(batch_size, num_samples)
        starts: list[tuple[int, int, bool]] = []  # position, epoch, fresh
        for epoch in range(config.start_epoch, -(-end // num_samples)):
            start, stop = epoch * num_samples, (epoch + 1) * num_samples
            fresh = not every_epochs or (epoch - config.start_epoch) % every_epochs == 0
            starts.append((start, epoch, fresh))
            if every_steps:
                step = -(-start // batch_size) + every_steps
                # What is left of an epoch must be worth a plan.
                while (step + every_steps / 2) * batch_size < min(stop, end):
                    starts.append((step * batch_size, epoch, True))
                    step += every_steps
        return cls(tuple(_with_ends(starts, num_samples, batch_size, lead)), min(first, end))


def _with_ends(
    starts: list[tuple[int, int, bool]], num_samples: int, batch_size: int, lead: int
) -> list[Switch]:
    switches, before = list[Switch](), 0
    for version, (start, epoch, fresh) in enumerate(starts):
        stop = (epoch + 1) * num_samples
        if version + 1 < len(starts):
            stop = starts[version + 1][0]
        step = start // batch_size  # steps done before the first batch that needs it
        asked_step = max(before, step - lead) if fresh else before
        switches.append(Switch(version, start, stop, epoch, asked_step, fresh))
        before = step
    return switches


def read_duration(text: str, name: str) -> Duration:
    """A length of training in the `[negatives]` section."""
    try:
        duration = Duration(text)
    except ValueError as error:
        raise ConfigError(f"negatives.{name}: {error}") from None
    if duration.unit == "minutes" or duration.value <= 0:
        raise ConfigError(
            f"negatives.{name} = {text!r}: write steps, samples or epochs, more than none"
        )
    return duration
