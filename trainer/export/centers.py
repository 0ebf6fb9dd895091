"""A table of class centers for others: Parquet, written in row groups."""

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from torch import Tensor

from trainer.centers.edit import names_of
from trainer.centers.files import StoredCenters
from trainer.centers.identities import NameTable


def export_centers(
    stored: StoredCenters, out: Path, progress: Callable[[int, int], None] | None = None
) -> Path:
    """Write columns name, row, aliases, center (float32, as long as stored); return the file.

    With sub-centers a row of the file is one of them, numbered in the column subcenter. A block of
    centers is in memory at a time; the file appears whole or not at all.
    """
    names = names_of(stored)
    first, aliases = names.first_names(), _aliases(names, stored.num_classes)
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(f".{out.name}.part")
    try:
        with pq.ParquetWriter(part, _schema(stored), use_dictionary=False) as writer:
            for start, rows in stored.present():
                writer.write_table(_table(stored, start, rows, first, aliases))
                if progress is not None:
                    progress(start + len(rows) // stored.subcenters, stored.num_classes)
        part.replace(out)
    finally:
        part.unlink(missing_ok=True)
    return out


def _schema(stored: StoredCenters) -> pa.Schema:
    fields = [("name", pa.large_string()), ("row", pa.int64())]
    if stored.subcenters > 1:
        fields.append(("subcenter", pa.int64()))
    fields.append(("aliases", pa.list_(pa.large_string())))
    return pa.schema([*fields, ("center", pa.list_(pa.float32(), stored.dim))])


def _table(
    stored: StoredCenters,
    start: int,
    rows: Tensor,  # (k * subcenters, d)
    names: pa.LargeStringArray,
    aliases: dict[int, list[str]],
) -> pa.Table:
    each = stored.subcenters
    classes = [start + i // each for i in range(len(rows))]
    columns = {
        "name": names.take(pa.array(classes, pa.int64())),
        "row": pa.array(classes, pa.int64()),
        "subcenter": pa.array([i % each for i in range(len(rows))], pa.int64()),
        "aliases": pa.array([aliases.get(c, []) for c in classes], pa.list_(pa.large_string())),
        "center": pa.FixedSizeListArray.from_arrays(
            pa.array(rows.float().flatten().numpy()), stored.dim
        ),
    }
    schema = _schema(stored)
    return pa.table([columns[name] for name in schema.names], schema=schema)


def _aliases(names: NameTable, num_classes: int) -> dict[int, list[str]]:
    """The other names of the classes that have some."""
    if len(names.numbers) == num_classes:
        return {}
    first = dict(enumerate(names.first_names().to_pylist()))
    found: dict[int, list[str]] = {}
    for name, number in zip(names.names.to_pylist(), names.numbers.tolist(), strict=True):
        if name != first[number]:
            found.setdefault(number, []).append(name)
    return found
