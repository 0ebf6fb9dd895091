"""The index of a set of shards: where each sample's bytes lie, found once from tar headers.

`load_index` is the way in: it expands the shards, scans those that are new or changed
(`data/scan.py`, `data/tar.py`, `data/rows.py`), keeps one Parquet file a shard (`data/table.py`)
and counts the samples that have what is asked for. Rows stay in the files until they are needed,
so an Index of 100 million samples opens in the memory of its shard list.
"""

import hashlib
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from data.errors import DataError
from data.rows import DEFAULT_KEYS, Keys, find_ending
from data.scan import Progress, index_shards
from data.shards import expand_shards
from data.table import ROW_GROUP, Block, ShardTable
from data.usable import explain_empty, usable_rows

_CACHED_BLOCKS = 4096  # of ROW_GROUP rows: below 300 MB, and two windows of 64 lanes of 32 chunks
_COLUMNS = ("width", "height", "label", "caption")


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
    """`caption_hash` of the first caption, 0 when unknown."""

    @property
    def name(self) -> str:
        """ "<shard name>:<key>", for people."""
        return f"{self.shard.rpartition('/')[2]}:{self.key}"

    def part(self, endings: str) -> Part | None:
        """The first of `endings` ("jpg;jpeg;png") that the sample has."""
        place = find_ending([part.ending for part in self.parts], endings)
        return self.parts[place] if place >= 0 else None


@dataclass(frozen=True)
class Problem:
    """Something wrong in a shard: what, where, and which sample it costs."""

    shard: str
    kind: str
    """Damage: truncated, bad_header, data_after_end, compression, empty. Samples left out:
    missing_part, incomplete (beside damage), duplicate_key. Others: bad_label, unsupported
    (links, sparse files), ignored_member (no key or ending)."""
    offset: int
    detail: str
    key: str = ""

    def __str__(self) -> str:
        key = f" {self.key}" if self.key else ""
        return f"{self.shard}: {self.kind} at {self.offset}:{key} {self.detail}"


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
    """Samples of many shards by id; immutable, and small when it travels to another process."""

    shards: tuple[ShardInfo, ...]
    counts: NDArray[np.int64]
    """(num_shards,) usable samples of each shard."""
    fingerprint: str
    """Identity of the data: shard names and sizes, samples and their places, counts."""
    problems: tuple[Problem, ...]

    def __init__(self, tables: Sequence[ShardTable], required: Sequence[str]) -> None:
        self._tables = tuple(tables)
        self._rows: dict[int, NDArray[np.int64]] = {}
        """Usable rows of the shards where not all are."""
        problems: list[Problem] = []
        for number, table in enumerate(self._tables):
            rows, notes = usable_rows(table, required)
            if rows is not None:
                self._rows[number] = rows
            problems += [Problem(table.source.url, *note) for note in (*table.notes, *notes)]
        self.problems = tuple(problems)
        counts = [len(self._rows.get(i, range(t.num_rows))) for i, t in enumerate(self._tables)]
        self.counts = np.array(counts, np.int64)
        self._ends = np.cumsum(self.counts)
        self.shards = tuple(map(_describe, self._tables, counts))
        self.fingerprint = _fingerprint(self._tables, self._rows)
        self._blocks: OrderedDict[tuple[int, int], Block] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def entries(
        self,
        ids: NDArray[np.int64] | Sequence[int],  # (n,)
    ) -> list[Entry]:
        """Samples by id, in the order asked for. Raises IndexError outside [0, len)."""
        wanted = np.asarray(ids, np.int64).reshape(-1)
        if len(wanted) and not 0 <= wanted.min() <= wanted.max() < len(self):
            raise IndexError(f"sample ids lie in [0, {len(self)}); got {wanted.min()} or more")
        shards = np.searchsorted(self._ends, wanted, side="right")
        rows = wanted - (self._ends - self.counts)[shards]
        places = zip(wanted.tolist(), shards.tolist(), rows.tolist(), strict=True)
        return [self._entry(*place) for place in places]

    def why_unlabelled(self, sample: int, missing: str) -> str:
        """ "<name>: why" for an error: what was told of the sample's label, else that it has no
        `missing`.
        """
        (entry,) = self.entries([sample])
        told = [
            problem.detail
            for problem in self.problems
            if (problem.kind, problem.shard, problem.key) == ("bad_label", entry.shard, entry.key)
        ]
        endings = ", ".join(part.ending for part in entry.parts)
        return f"{entry.name}: " + (told[0] if told else f"it has no {missing}, only {endings}")

    def column(
        self,
        name: str,
    ) -> NDArray[np.int64]:  # (len(self),)
        """ "label", "width", "height" or "caption" (a hash) of every sample, by id."""
        return np.concatenate([np.zeros(0, np.int64), *self.iter_column(name)])

    def iter_column(
        self,
        name: str,
    ) -> Iterator[NDArray[np.int64]]:  # (counts[shard],)
        """The same shard by shard, for what need not stand in memory at once."""
        if name not in _COLUMNS:
            raise ValueError(f"{name!r} is no column: {', '.join(_COLUMNS)} are")
        for number, table in enumerate(self._tables):
            values = table.columns([name])[name].to_numpy()
            rows = self._rows.get(number)
            yield values if rows is None else values[rows]

    def iter_label_lists(
        self,
    ) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int32]]]:  # (counts[shard],), (their sum,)
        """Shard by shard, how many labels the samples' lists have (-1: no list) and which."""
        for number, table in enumerate(self._tables):
            lists = table.columns(["labels"])["labels"].combine_chunks()
            if number in self._rows:
                lists = lists.take(pa.array(self._rows[number]))
            counts = pc.fill_null(pc.list_value_length(lists), -1)
            yield counts.to_numpy().astype(np.int64), lists.flatten().to_numpy()

    def iter_keys(self) -> Iterator[pa.StringArray]:  # (counts[shard],)
        """Shard by shard, the keys of the samples."""
        for number, table in enumerate(self._tables):
            keys = table.columns(["key"])["key"].combine_chunks()
            rows = self._rows.get(number)
            yield keys if rows is None else keys.take(pa.array(rows))

    @property
    def labels(self) -> NDArray[np.int64]:  # (len(self),)
        """Labels by id, -1 when unknown; read from the files at each call."""
        return self.column("label")

    def _entry(self, sample: int, shard: int, row: int) -> Entry:
        if shard in self._rows:
            row = int(self._rows[shard][row])
        group, row = divmod(row, ROW_GROUP)
        block = self._block(shard, group)
        first, last = block.starts[row], block.starts[row + 1]
        places = zip(
            block.layouts[block.layout[row]],
            block.offsets[first:last].tolist(),
            block.sizes[first:last].tolist(),
            strict=True,
        )
        parts = tuple([Part(*place) for place in places])
        key = block.keys[row].as_py()
        return Entry(sample, self.shards[shard].url, key, parts, *block.scalars[row].tolist())

    def _block(self, shard: int, group: int) -> Block:
        place = (shard, group)
        with self._lock:
            if place in self._blocks:
                self._blocks.move_to_end(place)
                return self._blocks[place]
        block = self._tables[shard].block(group)
        with self._lock:
            self._blocks[place] = block
            if len(self._blocks) > _CACHED_BLOCKS:
                self._blocks.popitem(last=False)
        return block

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        del state["_lock"], state["_blocks"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._blocks, self._lock = OrderedDict(), threading.Lock()


def load_index(
    spec: str | Sequence[str],
    *,
    image_key: str = DEFAULT_KEYS.image,
    caption_key: str = DEFAULT_KEYS.caption,
    label_key: str = DEFAULT_KEYS.label,
    label_lists: bool = False,
    workers: int = 0,
    progress: Progress | None = None,
) -> Index:
    """The index of a shard spec; only shards that are new or changed are scanned.

    Samples without an image or a caption, and with `label_lists` without a list of labels, are
    left out and reported; an empty key asks for nothing. A missing label is -1. Raises DataError
    for a missing shard, an empty set, and a key that no sample has.
    """
    keys = Keys(image_key, caption_key, label_key)
    lists = keys.labels if label_lists else ""
    required = [key for key in (keys.image, keys.caption_ending, lists) if key]
    return build_index(
        expand_shards(spec), required=required, keys=keys, workers=workers, progress=progress
    )


def build_index(
    shards: Sequence[str],
    *,
    required: Sequence[str] = (DEFAULT_KEYS.image, DEFAULT_KEYS.caption),
    keys: Keys = DEFAULT_KEYS,
    fresh: bool = False,
    workers: int = 0,
    progress: Progress | None = None,
) -> Index:
    """The index of shards that are already expanded, of samples with all `required` endings.

    `fresh` scans shards anew that are already indexed. Raises DataError as `load_index`.
    """
    tables = index_shards(shards, keys, fresh=fresh, workers=workers, progress=progress)
    index = Index(tables, required)
    if len(index) == 0:
        raise DataError(explain_empty(tables, required))
    return index


def _describe(table: ShardTable, num_samples: int) -> ShardInfo:
    url, size_bytes, version, seekable = table.source
    return ShardInfo(url, size_bytes, version, num_samples, seekable)


def _fingerprint(tables: Sequence[ShardTable], rows: Mapping[int, NDArray[np.int64]]) -> str:
    # No folder and no time: copied data are the same data.
    state = hashlib.sha256()
    for number, table in enumerate(tables):
        name = os.path.basename(table.source.url.partition("?")[0])
        state.update(repr((name, table.source.size_bytes, table.digest)).encode())
        state.update(rows[number].astype("<i8").tobytes() if number in rows else b"all")
    return state.hexdigest()
