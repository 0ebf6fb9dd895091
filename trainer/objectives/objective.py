"""The interface between the loop and what it minimises."""

from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from data.loader import Batch
from trainer.models import FaceModel, TextModel, TwoTower

Outputs = tuple[Tensor, ...]
"""What a model returns, without what is None: (n, d) rows, and (1,) numbers such as the scale."""
Model = TwoTower | FaceModel | TextModel


class Objective(Protocol):
    """A loss over a model's outputs, and everything that only this kind of run has."""

    def inputs(self, batch: Batch) -> tuple[Tensor, ...]:
        """What the model takes, the first (n, ...) of this batch; others may have other lengths."""

    def most_rows(self, num_samples: int) -> int:
        """Rows of the longest input on any rank, when none has more samples than so many."""

    def loss(self, outputs: Outputs, batch: Batch, step: int) -> Tensor:
        """This rank's mean, (); the global loss is the mean over ranks. Collective."""

    def after_step(self, learning_rate: float, *, applied: bool) -> None:
        """Move what the engine does not; not `applied`: the step was skipped, nothing may move."""

    def numbers(self, outputs: Outputs) -> dict[str, float]:
        """Numbers of the last step for people. Collective."""

    def histograms(self, outputs: Outputs, batch: Batch) -> dict[str, list[int]] | None:
        """Counts by cosine of the last step for the report, if there are some. Collective."""

    def files(self) -> dict[str, Any]:
        """This rank's files of a checkpoint beside the engine's: name -> content."""

    def load(self, checkpoint: Path) -> None:
        """Take over what `files` stored, at any world size."""
