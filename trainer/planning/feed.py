"""The embedding store of a run: filled by its steps and by refresh passes, copied for each plan."""

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from data.dataset import SampleSet
from data.errors import DataError
from data.loader import Batch
from data.negatives.store import EmbeddingStore, Snapshot
from trainer.buffers import average_buffers
from trainer.config import Config, ConfigError
from trainer.objectives import Model
from trainer.planning.refresh import RefreshPass
from trainer.planning.rows import Projection, Side, gather_by_id
from trainer.planning.stored import restore_store, store_files
from trainer.ranks import Ranks
from trainer.step import StepOutput

_COPY_BYTES = 1 << 31  # a snapshot above it is a file
_AGES = 1 << 16  # rows whose ages are looked at


class Feed:
    """What goes into the store, which lies with rank 0; every rank calls it together."""

    def __init__(
        self,
        config: Config,
        folder: Path,  # of the store
        samples: SampleSet,
        model: Model,
        ranks: Ranks,
        *,
        autocast: torch.dtype | None,
    ) -> None:
        """Raises ConfigError for a side that such a model does not have, and where training steps
        see other images than a plan is of and there is no pass to embed those.
        """
        self._from_steps = not config.centers.quarter_turns
        if not self._from_steps and not config.negatives.refresh_pass:
            raise ConfigError(
                "centers.quarter_turns: training steps embed turned images, and plans are of them "
                "upright: set negatives.refresh_pass = true"
            )
        self._config, self._folder, self._samples = config, folder, samples
        self._model, self._ranks = model, ranks
        self._side = Side(config)
        dim, seed = config.negatives.dim, config.train.seed
        self._projection = Projection(model.embed_dim, dim, seed=seed, device=ranks.device)
        self._refresh = RefreshPass(
            config, samples, model, ranks,
            side=self._side, projection=self._projection, autocast=autocast,
        )  # fmt: skip
        self._store: EmbeddingStore | None = None
        self._drifts: list[float] = []
        self._refresh_s = 0.0

    def load(self, checkpoint: Path | None) -> None:
        """Begin with the rows of a checkpoint; None: with none.

        Raises ConfigError and DataError for rows that are damaged or of other data.
        """
        if not self._ranks.is_first:
            return
        self._store = EmbeddingStore.create(
            self._folder,
            self._samples.num_samples,
            self._projection.dim,
            fingerprint=self._samples.fingerprint,
        )
        if checkpoint is not None:
            restore_store(self._store, checkpoint)

    def write_step(self, step: int, batch: Batch, output: StepOutput) -> None:
        """The embeddings of a step, for nothing; one that was skipped writes nothing."""
        if not output.result.applied or not self._from_steps:
            return
        rows = self._side.rows(output.outputs)
        if len(rows) != len(batch.ids):
            raise DataError(
                f"negatives.side = {self._config.negatives.side!r}: {len(rows)} embeddings for "
                f"{len(batch.ids)} samples: plan by another side"
            )
        size, world_size = self._config.train.global_batch_size, self._ranks.world_size
        counts = [len(range(rank, size, world_size)) for rank in range(world_size)]
        found = gather_by_id(self._projection(rows), batch.ids, counts, self._ranks)
        if found is not None and self._store is not None:
            drift = self._store.drift(*found)
            if np.isfinite(drift):
                self._drifts.append(drift)
            self._store.write(*found, step)

    def embed_all(self, module: nn.Module, step: int, *, needed: bool) -> None:
        """The refresh pass with the weights of this step; not `needed`: what it does to them."""
        started, store = time.monotonic(), self._store
        average_buffers(self._model, self._ranks)
        if not needed:
            return
        self._refresh(module, lambda ids, rows: store.write(ids, rows, step) if store else None)
        self._refresh_s = time.monotonic() - started

    def snapshot(self) -> Snapshot | None:
        """The rows as they are, which later steps do not touch; None but on rank 0."""
        if self._store is None:
            return None
        if self._store.num_rows * self._store.dim * 2 > _COPY_BYTES:
            return self._store.snapshot(self._folder / "snapshot")
        rows, steps = self._store.part(0, self._store.num_rows)
        return Snapshot.of(rows, steps, self._store.fingerprint)

    def files(self) -> dict[str, Any]:
        """This rank's files of a checkpoint."""
        if self._store is None:
            return {}
        return store_files(self._store, later=self._config.checkpoint.background)

    def numbers(self, step: int) -> dict[str, float]:
        """For people, on rank 0; of drift and passes since the last call."""
        if self._store is None:
            return {}
        seen = self._store.steps[:: -(-self._store.num_rows // _AGES)]
        ages = step - seen[seen >= 0].astype(np.int64)
        numbers = {"store_fill": self._store.fill}
        if self._drifts:
            numbers["store_drift"] = float(np.mean(self._drifts))
        if len(ages):
            numbers |= {f"store_age_p{p}": float(np.percentile(ages, p)) for p in (50, 90)}
        if self._refresh_s:
            numbers["refresh_s"] = self._refresh_s
        self._drifts, self._refresh_s = [], 0.0
        return numbers
