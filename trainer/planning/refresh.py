"""The refresh pass: every sample embedded by the model of this step, dealt over the ranks.

Nothing is drawn: images as in evaluation, first captions, a model without dropout. So the rows are
the same whenever the pass is repeated with the same weights, and training goes on as if there had
been none.
"""

import logging
import time
from collections.abc import Callable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from data.augment import ImageTransform
from data.dataset import SampleSet
from data.loader import EvalBatch, iter_eval_batches
from trainer.collectives import gather_counts
from trainer.config import Config
from trainer.evaluate.towers import in_step
from trainer.models import TwoTower
from trainer.objectives import Model
from trainer.planning.rows import Projection, Side, gather_by_id
from trainer.ranks import Ranks

PROGRESS_EVERY_S = 30.0
Write = Callable[[NDArray[np.int64], NDArray[np.float32]], None]

logger = logging.getLogger("nsphere.planning")


class RefreshPass:
    """Embeds the samples of a run's one source."""

    def __init__(
        self,
        config: Config,
        samples: SampleSet,
        model: Model,
        ranks: Ranks,
        *,
        side: Side,
        projection: Projection,
        autocast: torch.dtype | None,
    ) -> None:
        self._config, self._samples, self._model = config, samples, model
        self._ranks, self._side = ranks, side
        self._projection, self._autocast = projection, autocast

    def __call__(self, module: nn.Module, write: Write) -> None:
        """Give every readable sample's row to `write`, on rank 0; collective."""
        started = told = time.monotonic()
        total, done = self._samples.num_samples, 0
        was_training = module.training
        module.eval()
        try:
            for rows, ids in self._embed(module):
                counts = gather_counts(len(ids), self._ranks.group, self._ranks.device)
                found = gather_by_id(rows, ids, counts, self._ranks)
                if found is not None:
                    write(*found)
                done += sum(counts)
                if time.monotonic() - told > PROGRESS_EVERY_S:
                    told = time.monotonic()
                    logger.info("refresh pass: %d of %d samples embedded", done, total)
        finally:
            module.train(was_training)
        seconds = time.monotonic() - started
        logger.info("refresh pass: %d of %d samples in %.1f s", done, total, seconds)

    def _embed(self, module: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
        """(n, dim) float16 rows and (n,) ids, as often on every rank."""
        device, images = self._ranks.device, self._side.is_images
        waiting: list[Tensor] = []

        def iter_inputs() -> Iterator[Tensor]:
            for batch in self._batches():
                if len(batch.ids):
                    waiting.append(batch.ids)
                    yield batch.images if images else _first_texts(batch)

        for chunk, num_rows in in_step(
            iter_inputs(), torch.uint8 if images else torch.int64, self._ranks
        ):
            with (
                torch.no_grad(),
                torch.autocast(device.type, self._autocast, enabled=self._autocast is not None),
            ):
                rows = self._rows(module, chunk.to(device, non_blocking=True))[:num_rows]
            ids = waiting.pop() if num_rows else torch.zeros(0, dtype=torch.int64)
            yield self._projection(rows), ids

    def _rows(self, module: nn.Module, inputs: Tensor) -> Tensor:
        if not self._side.is_images and isinstance(self._model, TwoTower):
            texts: Tensor = module(None, inputs).texts
            return texts
        rows: Tensor = module(inputs)[0]
        return rows

    def _batches(self) -> Iterator[EvalBatch]:
        transform = spec = None
        if self._side.is_images:
            size, mode = self._model.image_size, self._model.resize_mode
            transform = ImageTransform(size, None, resize_mode=mode)
        else:
            spec = self._model.tokenizer_spec
        return iter_eval_batches(
            self._samples.indexes[0],
            self._config.data,
            image_transform=transform,
            tokenizer_spec=spec,
            batch_size=self._config.eval.batch_size,
            rank=self._ranks.rank,
            world_size=self._ranks.world_size,
        )


def _first_texts(batch: EvalBatch) -> Tensor:
    """Each sample's first text, (n, T)."""
    first = torch.searchsorted(batch.text_owner, torch.arange(len(batch.ids)))
    return batch.texts[first]
