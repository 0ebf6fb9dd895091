"""What all margin losses share: their inputs, their answer, and the object that gives it."""

from collections.abc import Mapping
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from trainer.centers.margins.negatives import NegativeRule, Negatives
from trainer.config import ConfigError
from trainer.similarity.closed_form import plain_arithmetic


class Targets(NamedTuple):
    """All N rows of the global batch, equal on every rank."""

    cosines: Tensor
    """(N,) with the own class's center, the best of its sub-centers."""
    norms: Tensor
    """(N,) lengths of the embeddings before they were normalised."""
    sample_ids: Tensor
    """(N,) int64."""
    step: int


class Margined(NamedTuple):
    """What a loss needs of the margin, in the dtype of the cosines; no part of a graph."""

    logits: Tensor
    """(N,) of the targets, times scale."""
    slopes: Tensor
    """(N,) dlogit/dcosine."""
    norm_slopes: Tensor | None
    """(N,) dlogit/dnorm, where the margin follows the norm."""
    penalty: Tensor | None
    """(N,) what is added to the row's loss."""
    penalty_slopes: Tensor | None
    """(N,) dpenalty/dnorm."""
    negatives: Negatives
    """Turns a tile of cosines into logits in place, and returns their slopes."""


class Bent(NamedTuple):
    """What a family makes of the targets, in float64 and before the scale."""

    cosines: Tensor
    """(N,) with the margin."""
    slopes: Tensor
    """(N,) by the cosine that was given."""
    norm_slopes: Tensor | None = None
    """(N,) by the norm."""
    penalty: Tensor | None = None
    penalty_slopes: Tensor | None = None
    negatives: NegativeRule | None = None
    """None: a negative's cosine stays as it is."""


class Running:
    """Numbers that a loss carries from batch to batch; float64, 0-d, equal on every rank."""

    def __init__(self, starts: Mapping[str, float]) -> None:
        self._values = {k: torch.tensor(v, dtype=torch.float64) for k, v in starts.items()}

    def get(self, name: str, beside: Tensor) -> Tensor:  # ()
        """The present value, on the device of another tensor."""
        self._values[name] = self._values[name].to(beside.device)
        return self._values[name]

    def move(self, name: str, towards: Tensor, share: float, where: Tensor) -> None:
        """Take `share` of `towards` and keep the rest; nothing where `where` is false."""
        value = self.get(name, towards)
        self._values[name] = torch.where(where, value + share * (towards - value), value)

    def state(self) -> dict[str, float]:
        """All values, exactly."""
        return {name: float(value) for name, value in self._values.items()}

    def load(self, state: Mapping[str, float]) -> None:
        """Take over what `state` returned. Raises ConfigError for the state of another loss."""
        if state.keys() != self._values.keys():
            raise ConfigError(
                f"the checkpoint's loss carries {', '.join(sorted(state)) or 'nothing'}, this one "
                f"{', '.join(sorted(self._values)) or 'nothing'}: resume with the loss.name it was "
                "trained with"
            )
        for name, value in state.items():
            if not torch.isfinite(torch.tensor(value)):
                raise ConfigError(f"the checkpoint's loss carries {name} = {value}: not a number")
        self._values = {k: torch.tensor(v, dtype=torch.float64) for k, v in state.items()}


class Family(Protocol):
    """One way to put a margin on the target's cosine; its options are its fields."""

    def bend(self, targets: Targets) -> Bent:
        """Put the margin on the targets' cosines, which are float64 and within [-1, 1]."""


class Statistics(Protocol):
    """What a family that learns from the batches offers besides."""

    @property
    def running(self) -> Running:
        """What it carries from batch to batch."""

    def follow(self, targets: Targets, finite: Tensor) -> None:
        """Move the running numbers by this batch; nothing where `finite`, (), is false."""


class Margin:
    """The margin of one `[loss]` table: a function of the global batch and a few running numbers.

    With `normalised`, loss_i = logsumexp(target, negatives) - target + penalty; without (SFace),
    loss_i = sum(negatives) - target.
    """

    def __init__(
        self,
        family: Family,
        *,
        scale: float,
        statistics: Statistics | None = None,
        detached: bool = False,  # slope `scale` for every target, as if the margin were a constant
        normalised: bool = True,
        filter: str = "none",
        filter_threshold: float = 1.0,
    ) -> None:
        self.scale, self.normalised = scale, normalised
        self._family, self._statistics, self._detached = family, statistics, detached
        self._filter, self._filter_threshold = filter, filter_threshold

    def prepare(self, targets: Targets, *, training: bool) -> Margined:
        """Logits and slopes of all targets, and how negatives become logits.

        The same on every rank for the same targets. `training` moves the running statistics first,
        unless the batch holds a number that is not finite.
        """
        dtype = targets.cosines.dtype
        # N numbers: float64 costs nothing, and the slopes near cosines of 1 want it.
        wide = targets._replace(
            cosines=targets.cosines.detach().double().clamp(-1.0, 1.0),
            norms=targets.norms.detach().double(),
        )
        with plain_arithmetic(targets.cosines.device):
            if training and self._statistics is not None:
                finite = targets.cosines.isfinite().all() & targets.norms.isfinite().all()
                self._statistics.follow(wide, finite)
            bent = self._family.bend(wide)
            slopes = torch.ones_like(bent.slopes) if self._detached else bent.slopes
            by_norm = None if bent.norm_slopes is None else bent.norm_slopes * self.scale
            return Margined(
                logits=(bent.cosines * self.scale).to(dtype),
                slopes=(slopes * self.scale).to(dtype),
                norm_slopes=_cast(by_norm, dtype),
                penalty=_cast(bent.penalty, dtype),
                penalty_slopes=_cast(bent.penalty_slopes, dtype),
                negatives=Negatives(
                    self.scale,
                    bent.negatives,
                    filter=self._filter,
                    threshold=self._filter_threshold,
                    normalised=self.normalised,
                ),
            )

    def state(self) -> dict[str, float]:
        """What the checkpoint keeps."""
        return self._running.state()

    def load(self, state: Mapping[str, float]) -> None:
        """Take over what `state` returned. Raises ConfigError for the state of another loss."""
        self._running.load(state)

    @property
    def _running(self) -> Running:
        return Running({}) if self._statistics is None else self._statistics.running


def _cast(values: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if values is None else values.to(dtype)
