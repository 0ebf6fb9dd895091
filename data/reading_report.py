"""What an order costs to read: shards of a batch, reads, and bytes fetched beside those wanted."""

from dataclasses import dataclass

import numpy as np

from data.config import DataConfig
from data.dataset import SampleSet
from data.index import Entry
from data.read import FILE_GAP_BYTES, REMOTE_GAP_BYTES, Span, coalesce

NUM_BATCHES = 32


@dataclass(frozen=True)
class Reading:
    """Of batches spread over some positions, each read at once."""

    num_batches: int
    mean_shards: float
    """Distinct shards in a batch."""
    most_shards: int
    reads: float
    """Reads a sample."""
    amplification: float
    """Bytes read over bytes wanted: what lies between samples that are read together."""

    def __str__(self) -> str:
        return (
            f"shards in a batch: mean {self.mean_shards:.1f}, most {self.most_shards}; "
            f"{self.reads:.2f} reads a sample, {self.amplification:.3f} bytes read a byte wanted"
        )


def measure_reading(
    samples: SampleSet,
    config: DataConfig,
    global_batch_size: int,
    *,
    start: int = 0,
    stop: int,
    num_batches: int = NUM_BATCHES,
) -> Reading:
    """Of the whole batches within positions [start, stop), as many as `num_batches`.

    Of the index alone: no shard is opened.
    """
    first, last = -(-start // global_batch_size), stop // global_batch_size - 1
    steps = np.unique(np.linspace(first, max(first, last), num_batches).astype(np.int64))
    shards, reads, wanted, fetched = list[int](), 0, 0, 0
    for step in steps.tolist():
        entries = samples.entries(samples.batch(step, global_batch_size).ids)
        spans = [span for entry in entries for span in _spans(entry, config)]
        shards.append(len({entry.shard for entry in entries}))
        wanted += sum(size for _, _, size in spans)
        for _, low, high, _ in coalesce(spans, _gap):
            reads, fetched = reads + 1, fetched + high - low
    return Reading(
        num_batches=len(steps),
        mean_shards=float(np.mean(shards)),
        most_shards=max(shards),
        reads=reads / (len(steps) * global_batch_size),
        amplification=fetched / max(1, wanted),
    )


def _spans(entry: Entry, config: DataConfig) -> list[Span]:
    """The image and the caption of a sample, as far as it has them."""
    caption = "json" if config.caption_key.startswith("json:") else config.caption_key
    parts = (entry.part(endings) for endings in (config.image_key, caption) if endings)
    return [(entry.shard, part.offset, part.size) for part in parts if part is not None]


def _gap(shard: str) -> int:
    return REMOTE_GAP_BYTES if "://" in shard else FILE_GAP_BYTES
