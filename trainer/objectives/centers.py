"""One backbone against class centers: faces, and any set with very many classes."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.loader import Batch
from data.order import derive_key
from trainer.centers import ClassCenters
from trainer.centers.files import load_state, state_files
from trainer.centers.start import Rows
from trainer.collectives import sum_over_ranks
from trainer.hardness import Hardness, Keyed
from trainer.objectives.objective import Outputs
from trainer.ranks import Ranks

_TURNS = 21  # what the key is for


class CenterObjective:
    """The centers are outside the engine: their gradient is never averaged over ranks."""

    def __init__(
        self,
        centers: ClassCenters,
        rows: Rows,
        ranks: Ranks,
        *,
        hardness: Hardness,
        turns: int = 1,  # 4: an image turned by so many quarters is of another class
    ) -> None:
        self._turns, self._hardness = turns, hardness
        self.centers, self._ranks = centers, ranks
        self._names = rows.names if ranks.is_first else None
        self._row_of_label = None if rows.of_labels is None else torch.from_numpy(rows.of_labels)
        self._squared_norm = 0.0

    def inputs(self, batch: Batch) -> tuple[Tensor, ...]:
        if self._turns == 1:
            return (batch.images,)
        images, quarters = batch.images.clone(), self._quarters(batch)
        for turned in range(1, self._turns):
            here = quarters == turned
            images[here] = batch.images[here].rot90(turned, dims=(2, 3))
        return (images,)

    def most_rows(self, num_samples: int) -> int:
        return num_samples

    def loss(self, outputs: Outputs, batch: Batch, step: int) -> Tensor:
        (rows,) = outputs
        labels = batch.labels
        if self._row_of_label is not None:  # identities that were merged
            labels = self._row_of_label[labels.cpu()]
        if self._turns > 1:
            labels = labels * self._turns + self._quarters(batch)
        loss = self.centers(rows, labels, batch.ids, step)
        if self._hardness.is_due(step):
            held = self.centers.taking_part()
            columns, scale = Keyed(held.classes, held.read), self.centers.margin.scale
            self._hardness.measure_centers(
                batch, step, rows, labels, scale, columns, bars=held.targets
            )
        return loss

    def _quarters(self, batch: Batch) -> Tensor:  # (n,)
        """How far each image is turned: a function of the seed and its place in the run."""
        keys = derive_key(self.centers.seed, _TURNS, batch.positions.cpu().numpy())
        quarters = torch.from_numpy((keys % np.uint64(self._turns)).astype(np.int64))
        return quarters.to(batch.labels.device)

    def after_step(self, learning_rate: float, *, applied: bool) -> None:
        """The centers move with the backbone or not at all."""
        if applied:
            self._squared_norm = self.centers.step(learning_rate)
        else:
            self.centers.discard()

    def numbers(self, outputs: Outputs) -> dict[str, float]:
        (rows,) = outputs
        norms = torch.linalg.vector_norm(rows.double(), dim=1)
        sums = torch.tensor(
            [self._squared_norm, float(norms.sum()), len(norms)], dtype=torch.float64
        )
        squared, norm, count = sum_over_ranks(
            sums.to(self._ranks.device), self._ranks.group
        ).tolist()
        return {
            "centers_grad_norm": math.sqrt(squared),
            "embedding_norm": norm / count,
            **self.centers.numbers(),
            **self._hardness.numbers(),
        }

    def histograms(self, outputs: Outputs, batch: Batch) -> dict[str, list[int]] | None:  # noqa: ARG002
        """Of the sampled rows."""
        return self._hardness.histograms()

    def files(self) -> dict[str, Any]:
        return state_files(self.centers, self._names)

    def load(self, checkpoint: Path) -> None:
        load_state(self.centers, checkpoint)
