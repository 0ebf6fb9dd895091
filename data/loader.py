"""Positions -> batches, over worker processes. Order and content never depend on how many there are."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from data.augment import ImageTransform
from data.config import DataConfig
from data.dataset import SampleSet
from data.index import Index
from data.text import TokenizerSpec


@dataclass(frozen=True)
class Batch:
    """This rank's rows of one global batch, on the CPU."""

    images: Tensor  # (n, 3, H, W) uint8
    texts: Tensor  # (n, T) int64
    ids: Tensor  # (n,) int64 sample id over all sources, of the sample really delivered
    caption_ids: Tensor  # (n,) int64 hash of the caption chosen
    labels: Tensor  # (n,) int64, -1 when unknown
    positions: Tensor  # (n,) int64 places in the run's stream of samples
    keys: list[str]
    """(n,) "<shard name>:<key>"."""
    bad: list[tuple[str, str, str]]
    """(shard, key, reason) of each sample that could not be used and was replaced."""

    @property
    def num_bad(self) -> int:
        """How many samples had to be replaced."""
        return len(self.bad)

    def pin_memory(self) -> "Batch":
        """The same batch in page-locked memory, so that copies to a GPU can overlap."""
        raise NotImplementedError


@dataclass(frozen=True)
class EvalBatch:
    """Samples of an evaluation, each once over all ranks; a sample that is bad is left out."""

    images: Tensor  # (n, 3, H, W) uint8
    ids: Tensor  # (n,) int64 sample id in the index
    labels: Tensor  # (n,) int64, -1 when unknown
    texts: Tensor  # (m, T) int64 all captions of all n samples, m >= 0
    text_owner: Tensor  # (m,) int64 row of this batch that each text belongs to
    keys: list[str]
    captions: list[str]
    """(m,) the captions as text, normalised as configured."""
    bad: list[tuple[str, str, str]]


class TrainLoader:
    """Global batches `first_step`, `first_step + 1`, ... of a `SampleSet`, this rank's rows."""

    def __init__(
        self,
        samples: SampleSet,
        config: DataConfig,
        *,
        image_transform: ImageTransform,
        tokenizer_spec: TokenizerSpec,
        global_batch_size: int,
        seed: int,
        rank: int,
        world_size: int,
        device_type: str = "cpu",
    ) -> None:
        raise NotImplementedError

    def batches(self, first_step: int, num_steps: int) -> Iterator[Batch]:
        """Global batches [first_step, first_step + num_steps), 0-based; workers stay for the next call."""
        raise NotImplementedError

    def close(self) -> None:
        """End the workers."""
        raise NotImplementedError


def iter_eval_batches(
    index: Index,
    config: DataConfig,
    *,
    image_transform: ImageTransform,
    tokenizer_spec: TokenizerSpec,
    batch_size: int,
    rank: int,
    world_size: int,
) -> Iterator[EvalBatch]:
    """Every sample exactly once over the ranks, in id order; the same number of batches on each rank.

    Batches are balanced, so the last ones are ragged; one is empty only if there are fewer samples than
    ranks.
    """
    raise NotImplementedError
