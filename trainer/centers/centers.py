"""ClassCenters: the centers of C identities in parts over the ranks, their loss and their step.

Each rank holds the rows of its own classes; every rank's embeddings visit them. A step goes
`loss = centers(embeddings, labels)`, `loss.backward()`, `centers.step(learning_rate)`. The centers'
gradient is the global loss's and complete on its owner: it is never averaged over ranks.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.distributed import ProcessGroup

from data.order import derive_key
from trainer.centers.head import Chosen, GlobalBatch, Measured, gather_batch, measure
from trainer.centers.margins import Margin, build_margin
from trainer.centers.neighbours import Neighbours
from trainer.centers.optimizer import SparseOptimizer
from trainer.centers.parts import Part
from trainer.centers.sampling import sample_classes
from trainer.centers.stream import UnitRows
from trainer.collectives import count_ranks, own_rank
from trainer.config import CentersConfig, LossConfig
from trainer.losses.checks import check_per_row, check_rows
from trainer.similarity.closed_form import attach_gradients, plain_arithmetic

_INIT = 17  # what the key is for
_INIT_ROWS = 4096  # rows drawn together


class TakingPart(NamedTuple):
    """Centers of this rank in a loss."""

    classes: Tensor
    """(m,) int64."""
    read: Callable[[Tensor], Tensor]
    """(k,) places among the m -> (k, subcenters, d) unit rows."""
    targets: Tensor | None
    """(n,) cosines of this rank's samples with their own centers, with the margin; None: the loss
    (SFace) weighs cosines instead."""


class ClassCenters:
    """Centers of `num_classes` identities in parts over `group`, with a margin softmax over them.

    `loss` names the margin and its options, `config` the sampling and the optimizer. Memory is
    `bytes_per_class` times this rank's classes, O(N d) for a global batch of N, and a tile: no
    (samples x centers) matrix, no second copy of the centers, no gradient of them as a whole.
    Every rank calls every method together.
    """

    def __init__(
        self,
        num_classes: int,
        dim: int,
        group: ProcessGroup | None = None,
        *,
        loss: LossConfig | str = "arcface",
        config: CentersConfig | None = None,
        seed: int = 0,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,  # of computation
        wire: torch.dtype | None = None,  # in which embeddings travel; None: that of computation
        draw: bool = True,  # False: the centers come from a checkpoint
    ) -> None:
        if num_classes < 2:
            raise ValueError(f"num_classes = {num_classes}: a softmax needs at least 2 classes")
        self.config = config or CentersConfig()
        self.loss = LossConfig.model_validate({"name": loss}) if isinstance(loss, str) else loss
        self.num_classes, self.dim, self.seed, self.group = num_classes, dim, seed, group
        self.device, self.dtype, self.wire = torch.device(device), dtype, wire or dtype
        self.part = Part.of_rank(num_classes, own_rank(group), count_ranks(group))
        self.margin: Margin = build_margin(self.loss, seed=seed)
        self.subcenters = self.config.subcenters
        self.steps = 0
        self.optimizer = SparseOptimizer(
            self.config,
            num_rows=len(self.part) * self.subcenters,
            dim=dim,
            first_row=self.part.start * self.subcenters,
            device=self.device,
            seed=seed,
            compute_dtype=dtype,
        )
        self.neighbours = Neighbours.build(self.config, self.part, self.device)
        self._pending: Measured | None = None
        self._target_cosine = torch.zeros(())
        self._anchor = torch.zeros((), dtype=dtype, device=self.device, requires_grad=True)
        if draw:
            self._draw()

    @staticmethod
    def bytes_per_class(config: CentersConfig, dim: int) -> int:
        """Bytes that a class takes for its centers and their optimizer, on the rank that owns it.

        4 * dim with bfloat16 rows and momentum, and in exact mode 4 for the step that it has come
        to: 10 million classes of 128 dimensions take 5.2 GB over all ranks.
        """
        each = SparseOptimizer.bytes_per_row(config, dim) * config.subcenters
        return each + (8 * config.hard_neighbours if config.hard_share else 0)

    def __call__(
        self,
        embeddings: Tensor,  # (n, d) not normalised
        labels: Tensor,  # (n,) int in [0, C)
        sample_ids: Tensor | None = None,  # (n,) int: key of drawn margins; None: place in batch
        step: int | None = None,  # key of sampled classes and drawn margins; None: steps taken
        *,
        training: bool | None = None,  # move running statistics; None: as gradients are enabled
    ) -> Tensor:  # () this rank's mean
        """W/N times the sum of this rank's losses: its mean over ranks is the global loss.

        Raises ValueError on every rank for a label out of range on any, and for wrong shapes.
        """
        check_rows(embeddings=embeddings)
        check_per_row("labels", labels, embeddings)
        check_per_row("sample_ids", sample_ids, embeddings)
        if embeddings.shape[1] != self.dim:
            raise ValueError(f"embeddings have {embeddings.shape[1]} columns, centers {self.dim}")
        self._check_pending()
        with_gradient = torch.is_grad_enabled()
        step = self.steps if step is None else step
        with plain_arithmetic(self.device):
            rows = embeddings.detach().to(self.device, self.dtype)
            batch = gather_batch(rows, labels, sample_ids, self.num_classes, self.group)
            training = with_gradient if training is None else training
            measured = self._measure(rows, batch, step, training)
        self._target_cosine = measured.target_cosine
        if not with_gradient:
            return measured.value
        self._pending = measured
        gradients = [measured.gradient, torch.zeros_like(measured.value)]
        result = attach_gradients(measured.value, [embeddings, self._anchor], gradients)
        result.register_hook(measured.receive)
        return result

    def step(self, learning_rate: float) -> float:
        """Update the centers that took part in the loss just back-propagated.

        Returns this rank's squared norm of their gradient. A block of centers is updated as soon
        as its gradient is complete.
        """
        pending, self._pending = self._pending, None
        if pending is None or pending.upstream is None:
            raise RuntimeError("step(): no loss has been back-propagated since the last step")
        rate = learning_rate * self.config.lr_scale
        squared = torch.zeros((), dtype=torch.float64, device=self.device)
        with plain_arithmetic(self.device):
            share = pending.share * float(pending.upstream)
            for rows, unit, sums in pending.sweeps.row_gradients(
                pending.logsumexps, pending.target_weights, share
            ):
                along = (sums * unit).sum(1, keepdim=True)
                gradient = sums.addcmul_(unit, along, value=-1).div_(pending.rows.norms)
                squared += gradient.square().sum(dtype=torch.float64)
                self.optimizer.update(pending.rows.table_rows(rows), gradient, rate)
            self.optimizer.end(rate)
            self.steps += 1
            if self.neighbours is not None and self.steps % self.config.hard_every == 0:
                self.neighbours.refresh(self.optimizer, self.num_classes, self.group)
        return float(squared)

    def discard(self) -> None:
        """Forget the loss just back-propagated: a skipped step changes nothing."""
        self._pending = None

    def taking_part(self) -> TakingPart:
        """What the loss just computed held the embeddings against, until `step` or `discard`."""
        if self._pending is None:
            raise RuntimeError("taking_part(): no loss with a gradient since the last step()")
        rows, each = self._pending.rows, self.subcenters
        table = rows.table_rows(slice(0, rows.shape[0]))
        if isinstance(table, slice):
            table = torch.arange(table.start, table.stop, device=self.device)

        def read(places: Tensor) -> Tensor:
            turns = torch.arange(each, device=places.device)
            units = rows.read_at((places.unsqueeze(1) * each + turns).flatten())
            return units.view(len(places), each, self.dim)

        classes = table[::each] // each + self.part.start
        targets = self._pending.margined / self.margin.scale if self.margin.normalised else None
        return TakingPart(classes, read, targets)

    def numbers(self) -> dict[str, float]:
        """For people: the mean cosine of the last global batch with its own centers."""
        return {"target_cosine": float(self._target_cosine)}

    def _check_pending(self) -> None:
        if self._pending is not None and self._pending.upstream is not None:
            raise RuntimeError(
                "two losses before one step(): call step(learning_rate) or discard() after each "
                "backward pass; a batch too large for memory is embedded in chunks, with one loss"
            )

    def _measure(
        self,
        rows: Tensor,
        batch: GlobalBatch,
        step: int,
        training: bool,  # noqa: FBT001
    ) -> Measured:
        return measure(
            rows,
            batch,
            self._choose(batch.labels, step),
            self.margin,
            self.group,
            step=step,
            subcenters=self.subcenters,
            wire=self.wire,
            training=training,
        )

    def _choose(self, labels: NDArray[np.int64], step: int) -> Chosen:
        """The rows that take part, brought to the present."""
        start, count = self.part.start, len(self.part)
        here = (labels >= start) & (labels < self.part.stop)
        if self.config.sample_rate == 1:
            return Chosen(self._read(None, count), np.where(here, labels - start, -1), None)
        positives = np.unique(labels)
        hard = None if self.neighbours is None else self.neighbours.of(positives, self.group)
        sample = sample_classes(
            self.part,
            positives,
            self.config.sample_rate,
            seed=self.seed,
            step=step,
            hard=hard,
            hard_share=self.config.hard_share,
            weighed=self.config.correction,
        )
        places = np.where(here, np.searchsorted(sample.classes, labels - start), -1)
        log_weights = None
        if self.config.correction:
            log_weights = torch.from_numpy(sample.log_weights).to(self.device, self.dtype)
        classes = torch.from_numpy(sample.classes).to(self.device)
        return Chosen(self._read(classes, len(classes)), places, log_weights)

    def _read(self, classes: Tensor | None, count: int) -> UnitRows:
        """All rows of these local classes (None: of all) as unit rows, at the present step."""
        rows: Tensor | slice = slice(0, count * self.subcenters)
        if classes is not None:
            each = torch.arange(self.subcenters, device=self.device)
            rows = (classes.unsqueeze(1) * self.subcenters + each).flatten()
        self.optimizer.begin(rows)
        return UnitRows(self.optimizer, rows, count * self.subcenters, self.dtype, self.device)

    def _draw(self) -> None:
        """Centers from a normal distribution: the same ones at any world size, no two alike."""
        first, std = self.part.start * self.subcenters, self.config.init_std
        for start, drawn in draw_rows(first, self.optimizer.num_rows, self.dim, std, self.seed):
            self.optimizer.fill(start - first, drawn.to(self.dtype))


def draw_rows(
    first: int, count: int, dim: int, std: float, seed: int
) -> Iterator[tuple[int, Tensor]]:  # (k, dim)
    """Rows [first, first + count) of the start, some at a time: a function of seed and row."""
    stop = first + count
    for start in range(first // _INIT_ROWS * _INIT_ROWS, stop, _INIT_ROWS):
        key = int(derive_key(seed, _INIT, start // _INIT_ROWS)[0] >> np.uint64(1))
        generator = torch.Generator().manual_seed(key)
        drawn = torch.randn(_INIT_ROWS, dim, generator=generator) * std
        low, high = max(start, first), min(start + _INIT_ROWS, stop)
        yield low, drawn[low - start : high - start]
