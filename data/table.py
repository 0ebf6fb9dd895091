"""One shard's index as a Parquet file: written once, opened by its footer, read in blocks.

It lies beside the shard where that folder can be written to, else under `$NSPHERE_CACHE` or
`~/.cache/nsphere`. Columns: key, endings ("cls/jpg/txt"), offsets, sizes, width, height, label,
caption, labels (lists, null where unknown); the footer says of which version of the shard it speaks
and what was wrong there.
"""

import hashlib
import json
import os
import re
import stat
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from data.errors import DataError
from data.rows import Keys, Note, Rows
from data.shards import INDEX_ENDING, local_path

ROW_GROUP = 1024
"""Rows that are read together."""

_FORMAT = 2
_FOOTER = b"nsphere"
_SCALARS = ("width", "height", "label", "caption")
_DELTAS = (
    *("offsets.list.element", "sizes.list.element", "labels.list.element"),
    *("width", "height", "label"),
)
_IN_BLOCKS = ["key", "endings", "offsets", "sizes", *_SCALARS]


class Source(NamedTuple):
    """Which state of which shard an index speaks of."""

    url: str
    size_bytes: int
    """-1 when the source cannot say."""
    version: str
    seekable: bool


@dataclass(frozen=True)
class ShardTable:
    """An index file without its rows."""

    path: Path
    source: Source
    keys: Keys
    digest: str
    num_rows: int
    layouts: tuple[tuple[tuple[str, ...], int], ...]
    """Each distinct sequence of endings, and how many rows have it."""
    num_captions: int
    json_fields: tuple[str, ...]
    notes: tuple[Note, ...]

    def columns(self, names: Sequence[str]) -> pa.Table:
        """Whole columns of the file. Raises DataError if it changed since it was opened."""
        return self._open().read(list(names), use_threads=False)

    def block(self, number: int) -> "Block":
        """Rows `number * ROW_GROUP` and on. Raises DataError if the file changed."""
        table = self._open().read_row_group(number, columns=_IN_BLOCKS, use_threads=False)
        return Block.from_table(table)

    def _open(self) -> pq.ParquetFile:
        try:
            file = pq.ParquetFile(self.path, page_checksum_verification=True)
            footer = json.loads(file.metadata.metadata[_FOOTER])
        except (OSError, KeyError, ValueError) as error:
            raise DataError(
                f"{self.path}: the index cannot be read ({error}); start again"
            ) from None
        if footer["digest"] != self.digest:
            raise DataError(f"{self.source.url} changed since the start: start again to index it")
        return file


class Block(NamedTuple):
    """Rows of one row group, ready to be picked from."""

    keys: pa.StringArray
    endings: pa.DictionaryArray
    layouts: list[tuple[str, ...]]
    layout: NDArray[np.int32]  # (n,)
    starts: NDArray[np.int32]  # (n + 1,)
    offsets: NDArray[np.int64]  # (parts,)
    sizes: NDArray[np.int64]  # (parts,)
    scalars: NDArray[np.int64]  # (n, 4) width, height, label, caption

    @classmethod
    def from_table(cls, table: pa.Table) -> "Block":
        """The columns of one row group."""
        endings = _whole(table["endings"])
        offsets = _whole(table["offsets"])
        return cls(
            keys=_whole(table["key"]),
            endings=endings,
            layouts=[tuple(text.split("/")) for text in endings.dictionary.to_pylist()],
            layout=endings.indices.to_numpy(),
            starts=offsets.offsets.to_numpy() - offsets.offsets[0].as_py(),
            offsets=offsets.flatten().to_numpy(),
            sizes=_whole(table["sizes"]).flatten().to_numpy(),
            scalars=np.stack([_whole(table[name]).to_numpy() for name in _SCALARS], axis=1),
        )


def save_table(
    source: Source, keys: Keys, rows: Rows, notes: Sequence[Note], json_fields: Sequence[str]
) -> ShardTable:
    """Write a shard's index, whole or not at all, to the first place that takes it.

    Raises DataError when neither the shard's folder nor the cache can be written.
    """
    counts = np.bincount(rows.layout, minlength=len(rows.layouts)).tolist()
    footer = {
        "format": _FORMAT,
        "source": source[1:],
        "keys": keys,
        "digest": rows.digest(),
        "num_rows": len(rows.keys),
        "layouts": list(zip(rows.layouts, counts, strict=True)),
        "num_captions": int(np.count_nonzero(rows.caption)),
        "json_fields": list(json_fields),
        "notes": list(notes),
    }
    text = json.dumps(footer)
    table = _arrow_table(rows).replace_schema_metadata({_FOOTER: text.encode()})
    failure: OSError | None = None
    for path in _places(source.url):
        try:
            _write(table, path)
        except OSError as error:
            failure = error
        else:
            return _parse_footer(path, source.url, json.loads(text))
    raise DataError(
        f"{source.url}: its index cannot be written ({failure}); let NSPHERE_CACHE name a"
        " folder that can be"
    )


def find_table(source: Source, keys: Keys) -> ShardTable | None:
    """The index of exactly this state of the shard and these keys, if there is one.

    A source that knows neither its size nor its version (`pipe:`) is indexed anew each time.
    """
    if source.size_bytes < 0 and not source.version:
        return None
    for path in index_paths(source.url):
        try:
            footer = json.loads(pq.read_metadata(path).metadata[_FOOTER])
            table = _parse_footer(path, source.url, footer)
        except (OSError, KeyError, TypeError, ValueError):  # none, or not whole
            continue
        if footer["format"] == _FORMAT and table.keys == keys and table.source == source:
            return table
    return None


def index_paths(url: str) -> list[Path]:
    """Where a shard's index may lie: beside it, and in the cache."""
    path = local_path(url)
    cached = _cache_path(url if path is None else os.path.abspath(path))
    return [cached] if path is None else [Path(path + INDEX_ENDING), cached]


def _places(url: str) -> list[Path]:
    # Root may write where the mode says that nobody should: the mode is asked too.
    beside, *cached = index_paths(url)
    if not cached:
        return [beside]
    folder = beside.parent
    mode = folder.stat().st_mode & (stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH)
    return [beside, *cached] if mode and os.access(folder, os.W_OK) else cached


def _cache_path(url: str) -> Path:
    root = os.environ.get("NSPHERE_CACHE") or os.path.join("~", ".cache", "nsphere")
    folder, _, name = url.rpartition("/")
    plain = re.sub(r"[^A-Za-z0-9._-]", "_", name)[-100:]
    if plain != name:  # a query or a command: the plain form alone might not be unique
        folder = url
    digest = hashlib.blake2b(folder.encode(), digest_size=10).hexdigest()
    return Path(root).expanduser() / "index" / digest / (plain + INDEX_ENDING)


def _write(table: pa.Table, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, draft = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            pq.write_table(
                table,
                file,
                row_group_size=ROW_GROUP,
                compression="zstd",
                use_dictionary=["endings"],
                column_encoding=dict.fromkeys(_DELTAS, "DELTA_BINARY_PACKED"),
                write_page_checksum=True,
            )
        os.chmod(draft, 0o644)
        os.replace(draft, path)
    except BaseException:
        os.unlink(draft)
        raise


def _arrow_table(rows: Rows) -> pa.Table:
    texts = pa.array(["/".join(layout) for layout in rows.layouts], pa.string())
    starts = pa.array(rows.starts, pa.int32())
    lists = np.cumsum([0, *np.maximum(rows.label_counts, 0)], dtype=np.int32)
    unknown = pa.array(rows.label_counts < 0)
    columns: dict[str, Any] = {
        "key": pa.array(rows.keys, pa.string()),
        "endings": pa.DictionaryArray.from_arrays(pa.array(rows.layout, pa.int32()), texts),
        "offsets": pa.ListArray.from_arrays(starts, rows.offsets),
        "sizes": pa.ListArray.from_arrays(starts, rows.sizes),
        **{name: pa.array(getattr(rows, name), pa.int64()) for name in _SCALARS},
        "labels": pa.ListArray.from_arrays(pa.array(lists), rows.label_ids, mask=unknown),
    }
    return pa.table(columns)


def _parse_footer(path: Path, url: str, footer: dict[str, Any]) -> ShardTable:
    return ShardTable(
        path=path,
        source=Source(url, *footer["source"]),
        keys=Keys(*footer["keys"]),
        digest=footer["digest"],
        num_rows=footer["num_rows"],
        layouts=tuple((tuple(endings), count) for endings, count in footer["layouts"]),
        num_captions=footer["num_captions"],
        json_fields=tuple(footer["json_fields"]),
        notes=tuple(Note(*note) for note in footer["notes"]),
    )


def _whole(column: pa.ChunkedArray) -> Any:
    return column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)
