"""Evaluation of shards with a model: what `nsphere eval` and the training loop share."""

from dataclasses import dataclass
from typing import Self

import torch
from torch import nn

from data.augment import ImageTransform
from data.index import Index
from data.loader import iter_eval_batches
from data.text import Tokenizer, build_tokenizer
from trainer.config import Config
from trainer.evaluate import evaluate
from trainer.models import TwoTower
from trainer.ranks import Ranks
from trainer.samples import index_shards

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}


@dataclass(frozen=True)
class Validation:
    """An evaluation set, ready to be embedded by any version of one model."""

    config: Config
    ranks: Ranks
    index: Index
    transform: ImageTransform
    model: TwoTower  # for its tokenizer; the weights used are those of the module called
    tokenizer: Tokenizer

    @classmethod
    def build(cls, config: Config, model: TwoTower, ranks: Ranks, shards: str | list[str]) -> Self:
        """Index `shards` and prepare the transform and tokenizer that `model` needs."""
        return cls(
            config=config,
            ranks=ranks,
            index=index_shards(shards, config),
            transform=ImageTransform(model.image_size, None, resize_mode=model.resize_mode),
            model=model,
            tokenizer=build_tokenizer(model.tokenizer_spec),
        )

    def __call__(self, module: nn.Module) -> dict[str, float]:
        """The numbers of `eval.tasks`; collective, the same on every rank."""
        batches = iter_eval_batches(
            self.index,
            self.config.data,
            image_transform=self.transform,
            tokenizer_spec=self.model.tokenizer_spec,
            batch_size=self.config.eval.batch_size,
            rank=self.ranks.rank,
            world_size=self.ranks.world_size,
        )
        return evaluate(
            module,
            batches,
            self.tokenizer,
            self.config.eval,
            self.ranks,
            autocast=AUTOCAST[self.config.train.precision],
        )
