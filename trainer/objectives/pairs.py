"""Images against texts: CLIP's and SigLIP's losses over both towers' outputs."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.loader import Batch
from trainer.config import LossConfig
from trainer.engine import Engine
from trainer.evaluate.cosines import cosine_histograms
from trainer.hardness import Hardness
from trainer.losses import clip_loss, siglip_loss
from trainer.models import TwoTower
from trainer.objectives.objective import Outputs
from trainer.ranks import Ranks


class PairObjective:
    """Row i of the images belongs to row i of the texts."""

    def __init__(
        self,
        config: LossConfig,
        model: TwoTower,
        engine: Engine,
        ranks: Ranks,
        wire: torch.dtype | None,  # in which texts and their gradients travel; None: float32
        hardness: Hardness,
    ) -> None:
        self._config, self._model, self._engine = config, model, engine
        self._ranks, self._wire, self._hardness = ranks, wire, hardness

    def inputs(self, batch: Batch) -> tuple[Tensor, ...]:
        return batch.images, batch.texts

    def most_rows(self, num_samples: int) -> int:
        return num_samples

    def loss(self, outputs: Outputs, batch: Batch, step: int) -> Tensor:
        images, texts, scale, *bias = outputs
        ids, caption_ids = self._identities(batch)
        if self._hardness.is_due(step):
            identities = {"ids": ids, "caption_ids": caption_ids}
            self._hardness.measure_pairs(
                batch, step, images, texts, float(scale.detach()), identities
            )
        if self._config.name == "siglip":
            return siglip_loss(
                images,
                texts,
                scale,
                bias[0],
                self._ranks.group,
                ids=ids,
                caption_ids=caption_ids,
                visiting=self._config.visiting,
                wire=self._wire,
            )
        return clip_loss(
            images,
            texts,
            scale,
            self._ranks.group,
            label_smoothing=self._config.label_smoothing,
            ids=ids,
            caption_ids=caption_ids,
            visiting=self._config.visiting,
            wire=self._wire,
        )

    def after_step(self, learning_rate: float, *, applied: bool) -> None:  # noqa: ARG002
        """Keep the scale within its limits."""
        if applied:
            self._engine.clamp(self._model.log_scale, *self._model.log_scale_limits)

    def numbers(self, outputs: Outputs) -> dict[str, float]:
        _, _, scale, *bias = outputs
        biases = {"bias": float(bias[0])} if bias else {}
        return {"scale": float(scale), **biases, **self._hardness.numbers()}

    def histograms(self, outputs: Outputs, batch: Batch) -> dict[str, list[int]] | None:
        images, texts, *_ = outputs
        return cosine_histograms(images, texts, batch.ids.to(images.device), self._ranks.group)

    def files(self) -> dict[str, Any]:
        """The towers hold everything."""
        return {}

    def load(self, checkpoint: Path) -> None:
        """Nothing beside the towers."""

    def _identities(self, batch: Batch) -> tuple[Tensor | None, Tensor | None]:
        device = self._ranks.device
        ids = batch.ids.to(device) if self._config.mask_equal_ids else None
        caption_ids = batch.caption_ids.to(device) if self._config.mask_equal_captions else None
        return ids, caption_ids
