"""A CSV, TSV or Parquet table of images and captions -> shards."""

import csv
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data.errors import DataError
from data.pack.folder import plain_key
from data.pack.images import image_part
from data.pack.limits import MAX_BYTES, MAX_SAMPLES
from data.pack.texts import utf8
from data.pack.writer import LeftOut, Packed, Progress, pack_iterable

Row = dict[str, Any]


def pack_table(
    table: str | Path,
    out: str | Path,
    *,
    image_column: str,
    caption_column: str,
    label_column: str = "",
    key_column: str = "",
    json_columns: Sequence[str] = (),
    max_samples: int = MAX_SAMPLES,
    max_bytes: int = MAX_BYTES,
    progress: Progress | None = None,
) -> Packed:
    """Write one sample a row, in the order of the table.

    The image is a path (relative ones from the table's folder), or, in Parquet, bytes or
    Hugging Face's {"bytes", "path"}. A caption that is a list goes whole into the JSON field
    `captions`, its first item into the text. Keys are row numbers unless `key_column` is given.
    Rows without an image or a caption are left out and told. Raises DataError for a column that
    does not exist and when nothing is left.
    """
    path = Path(table)
    wanted = [image_column, caption_column, label_column, key_column, *json_columns]
    total, rows = open_table(path, [column for column in wanted if column])
    left_out = LeftOut()

    def samples() -> Iterator[tuple[str, dict[str, Any]]]:
        for number, row in enumerate(rows):
            try:
                parts = row_image(row[image_column], path.parent) | _caption(row[caption_column])
            except DataError as error:
                left_out.add(f"{path} row {number}: {error}")
                continue
            if label_column:
                parts["cls"] = str(row[label_column])
            parts.setdefault("json", {}).update((name, row[name]) for name in json_columns)
            if not parts["json"]:
                del parts["json"]
            yield plain_key(str(row[key_column])) if key_column else f"{number:09d}", parts

    packed = pack_iterable(
        samples(),
        out,
        max_samples=max_samples,
        max_bytes=max_bytes,
        total=total,
        progress=progress,
    )
    return replace(packed, left_out=left_out.told())


def open_table(path: Path, wanted: Sequence[str]) -> tuple[int, Iterator[Row]]:
    """Number of rows (0: unknown) and the rows, of Parquet with the wanted columns only.

    Raises DataError for a wanted column that does not exist.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such table")
    ending = path.suffix.lower()
    if ending == ".parquet":
        try:
            file = pq.ParquetFile(path)
        except (OSError, pa.ArrowInvalid) as error:
            raise DataError(f"{path}: cannot be read as Parquet: {error}") from None
        _check_columns(path, file.schema_arrow.names, wanted)
        batches = file.iter_batches(batch_size=256, columns=list(dict.fromkeys(wanted)))
        return file.metadata.num_rows, (row for batch in batches for row in batch.to_pylist())
    if ending not in (".csv", ".tsv"):
        raise DataError(f"{path}: a table is .csv, .tsv or .parquet")
    delimiter = "\t" if ending == ".tsv" else ","
    with path.open(newline="", encoding="utf-8-sig") as file, utf8(path):
        _check_columns(path, next(csv.reader(file, delimiter=delimiter), []), wanted)
    return 0, _iter_csv(path, delimiter)


def _check_columns(path: Path, columns: Sequence[str], wanted: Sequence[str]) -> None:
    for column in wanted:
        if column not in columns:
            raise DataError(f"{path}: no column {column!r}; the columns are {', '.join(columns)}")


def _iter_csv(path: Path, delimiter: str) -> Iterator[Row]:
    with path.open(newline="", encoding="utf-8-sig") as file, utf8(path):
        rows = csv.DictReader(file, delimiter=delimiter)
        try:
            yield from rows
        except csv.Error as error:
            raise DataError(f"{path} line {rows.line_num}: {error}") from None


def row_image(value: Any, folder: Path) -> dict[str, Any]:
    """The image member of a row: a path below `folder`, bytes, or Hugging Face's struct."""
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, str) and value:
        try:
            value = (folder / value).read_bytes()
        except OSError as error:
            raise DataError(f"{value}: {error.strerror}") from None
    return dict(image_part(value if isinstance(value, bytes) else b""))


def _caption(value: Any) -> dict[str, Any]:
    captions = value if isinstance(value, list) else [value]
    captions = [text for text in captions if isinstance(text, str) and text.strip()]
    if not captions:
        raise DataError("no caption")
    several = {"json": {"captions": captions}} if isinstance(value, list) else {}
    return {"txt": captions[0], **several}
