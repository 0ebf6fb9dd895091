"""The index of a set of shards: where each sample's bytes lie, found once from tar headers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Progress = Callable[[int, int], None]
"""Called with (shards done, shards in all)."""


class Part(NamedTuple):
    """One member of a sample: its payload's place in the (decompressed) shard, in bytes."""

    ending: str
    offset: int
    size: int


class Entry(NamedTuple):
    """One usable sample; `id` counts usable samples over all shards, in shard order."""

    id: int
    shard: str
    key: str
    parts: tuple[Part, ...]
    width: int
    """Pixels of the image as stored, 0 when unknown; likewise `height`."""
    height: int
    label: int
    """Integer label, -1 when unknown."""
    caption: int
    """`caption_hash` of the (first) caption, 0 when unknown."""

    def part(self, endings: str) -> Part | None:
        """The first of `endings` ("jpg;jpeg;png") that the sample has."""
        raise NotImplementedError


@dataclass(frozen=True)
class Problem:
    """Something wrong in a shard: what, where, and which sample it costs."""

    shard: str
    kind: str
    """truncated, bad_header, missing_part, duplicate_key, empty, compression, unsupported, ..."""
    offset: int
    detail: str
    key: str = ""


@dataclass(frozen=True)
class ShardInfo:
    """What the index knows of one shard without reading its rows."""

    url: str
    size_bytes: int
    """Stored bytes; -1 when the source cannot say (`pipe:`)."""
    version: str
    """ETag, or modification time in ns, when it was indexed."""
    num_samples: int
    """Usable samples."""
    seekable: bool
    """False: offsets count in the decompressed stream."""


class Index:
    """Immutable; rows stay in Parquet files and are read in blocks when asked for."""

    shards: tuple[ShardInfo, ...]
    counts: NDArray[np.int64]
    """(num_shards,) usable samples of each shard."""
    fingerprint: str
    problems: tuple[Problem, ...]

    def __len__(self) -> int:
        raise NotImplementedError

    def entries(self, ids: NDArray[np.int64] | Sequence[int]) -> list[Entry]:
        """Samples by id, in the order asked for."""
        raise NotImplementedError

    def column(self, name: str) -> NDArray[np.int64]:
        """(len(self),) one of "label", "width", "height", "caption", over all samples by id."""
        raise NotImplementedError


def build_index(
    shards: Sequence[str],
    *,
    required: Sequence[str] = ("jpg;jpeg;png;webp", "txt"),
    caption_key: str = "txt",
    label_key: str = "cls",
    workers: int = 0,
    progress: Progress | None = None,
) -> Index:
    """Index expanded shards, whatever is already indexed."""
    raise NotImplementedError


def load_index(
    spec: str | Sequence[str],
    *,
    image_key: str = "jpg;jpeg;png;webp",
    caption_key: str = "txt",
    label_key: str = "cls",
    workers: int = 0,
    progress: Progress | None = None,
) -> Index:
    """Index of a shard spec; only new or changed shards are scanned. Empty keys: not required."""
    raise NotImplementedError
