"""LabelRows: a classifier row for each label, in parts over the ranks, and their step.

What class centers are to faces (`trainer/centers/centers.py`), for losses of `trainer/losses` that
take unit label rows. A step goes `taken = rows.take(ids)`, a loss of `taken.unit` with
`labels_are_parts=True`, its backward pass, `rows.step(learning_rate)`. The gradient is the global
loss's and complete on its owner: it is never averaged over ranks.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from trainer.centers.centers import draw_rows
from trainer.centers.files import StoredCenters
from trainer.centers.margins.margin import Running
from trainer.centers.optimizer import SparseOptimizer
from trainer.centers.parts import Part
from trainer.centers.rows import Ids
from trainer.centers.stream import SHORTEST
from trainer.collectives import count_ranks, own_rank
from trainer.config import CentersConfig, ConfigError

_ROWS_SQUARED = 2**14  # at a time
_FACES_ONLY = {
    "num_classes": "the label table says how many labels there are",
    "quarter_turns": "texts have no sides",
    "hard_share": 'labels.over = "all" holds all of them against a query',
    "init": "labels.init names a run whose label embeddings they start from",
    "identities": "labels are called by their texts",
}


@dataclass
class Taken:
    """The rows of this rank that take part in a step."""

    ids: Tensor  # (m,) int64 global labels
    unit: Tensor  # (m, d) a leaf: its gradient is asked for by `LabelRows.step`
    places: Ids  # of them in this rank's part
    lengths: Tensor  # (m, 1) before they were normalised


class LabelRows:
    """Rows of `num_labels` labels in parts over `group`, moved by the optimizer of `config`.

    Memory is `SparseOptimizer.bytes_per_row` times this rank's labels, and in a step three times
    the rows that take part (unit rows, their gradient, and that of the rows as they are stored).
    """

    def __init__(
        self,
        num_labels: int,
        dim: int,
        group: ProcessGroup | None = None,
        *,
        config: CentersConfig,
        seed: int = 0,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,  # of computation
        draw: bool = True,  # False: the rows come from elsewhere
    ) -> None:
        check_label_options(config)
        self.config, self.group, self.dim, self.device = config, group, dim, torch.device(device)
        self.num_classes, self.subcenters, self.steps = num_labels, 1, 0
        self.neighbours, self.margin = None, Running({})
        self.part = Part.of_rank(num_labels, own_rank(group), count_ranks(group))
        self._seed, self._dtype = seed, dtype
        self.optimizer = self._new_optimizer()
        self._taken: Taken | None = None
        if draw:
            for start, rows in draw_rows(
                self.part.start, len(self.part), dim, config.init_std, seed
            ):
                self.optimizer.fill(start - self.part.start, rows.to(dtype))

    def _new_optimizer(self) -> SparseOptimizer:
        return SparseOptimizer(
            self.config,
            num_rows=len(self.part),
            dim=self.dim,
            first_row=self.part.start,
            device=self.device,
            seed=self._seed,
            compute_dtype=self._dtype,
        )

    def start_from(self, unit: Tensor) -> None:
        """Take these directions (m, d) for this rank's rows, as long as drawn rows are."""
        self.optimizer.fill(0, unit.to(self._dtype) * (self.config.init_std * self.dim**0.5))

    def take(self, ids: Tensor | None) -> Taken:  # (m,) int64 of this rank's part, each once
        """Unit rows of these labels, None: of all this rank has, at the present step."""
        places: Ids = slice(0, len(self.part))
        if ids is None:
            ids = torch.arange(self.part.start, self.part.stop, device=self.device)
        else:
            places = ids.to(self.device) - self.part.start
        self.optimizer.begin(places)
        rows = self.optimizer.rows(places)
        lengths = torch.linalg.vector_norm(rows, dim=1, keepdim=True).clamp_(min=SHORTEST)
        self._taken = Taken(ids, (rows / lengths).requires_grad_(), places, lengths)
        return self._taken

    @torch.no_grad()
    def step(self, learning_rate: float) -> float:
        """Update the rows of the loss just back-propagated; this rank's squared gradient norm."""
        taken, self._taken = self._taken, None
        if taken is None or taken.unit.grad is None:
            raise RuntimeError("step(): no loss has been back-propagated since the last step")
        gradient, unit = taken.unit.grad, taken.unit.detach()
        along = (gradient * unit).sum(1, keepdim=True)
        gradient = gradient.addcmul_(unit, along, value=-1).div_(taken.lengths)
        # By blocks: as a whole it would take three more copies of the rows, two of them in float64.
        blocks = gradient.split(_ROWS_SQUARED)
        squared = float(sum(block.square().sum(dtype=torch.float64) for block in blocks))
        rate = learning_rate * self.config.lr_scale
        self.optimizer.update(taken.places, gradient, rate)
        self.optimizer.end(rate)
        self.steps += 1
        return squared

    def discard(self) -> None:
        """Forget the loss just back-propagated: a skipped step changes nothing."""
        self._taken = None

    def unit_rows(self) -> Tensor:
        """(m, d) all of this rank's part at the present step, for an evaluation.

        Nothing moves: rows that are behind are brought to the present in a copy.
        """
        optimizer = self.optimizer
        if "last_step" in optimizer.tables():
            optimizer = self._new_optimizer()
            optimizer.load(self.optimizer.tables(), self.optimizer.history())
            optimizer.finish()
        return torch.nn.functional.normalize(optimizer.rows(slice(0, len(self.part))), dim=1)


def read_label_rows(checkpoint: Path, part: Part) -> Tensor:
    """(m, d) float32 unit rows of a part of a checkpoint's labels, at any world size.

    Raises ConfigError where it holds no rows, or those of another number of labels.
    """
    stored = StoredCenters.open(checkpoint)
    if stored.num_classes != part.num_classes:
        raise ConfigError(
            f"{checkpoint}: it has rows of {stored.num_classes:,} labels, the label table "
            f"{part.num_classes:,}: set labels.table to the one it was trained with"
        )
    rows = torch.empty(len(part), stored.dim)
    for first, block in stored.present(start=part.start):
        low, high = first, min(first + len(block), part.stop)
        if low >= part.stop:
            break
        rows[low - part.start : high - part.start] = block[: high - low]
    return torch.nn.functional.normalize(rows, dim=1)


def check_label_options(config: CentersConfig) -> None:
    """Raise ConfigError naming an option of `[centers]` that label rows cannot have."""
    blank = CentersConfig()
    problems = [
        f"centers.{name} is for identities: {why}"
        for name, why in _FACES_ONLY.items()
        if getattr(config, name) != getattr(blank, name)
    ]
    if config.sample_rate < 1:
        problems.append('centers.sample_rate: take labels.over = "batch" for part of the labels')
    if config.subcenters > 1:
        problems.append("centers.subcenters: a label has one row")
    if problems:
        raise ConfigError("; ".join(problems))
