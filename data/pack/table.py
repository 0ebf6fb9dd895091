"""A CSV, TSV or Parquet table of images and captions -> shards."""

import csv
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from data.decode import image_size
from data.errors import DataError
from data.pack.folder import plain_key
from data.pack.writer import MAX_BYTES, MAX_SAMPLES, Packed, Progress, pack_iterable

Row = dict[str, Any]

_ENDING_OF_MAGIC = (
    (b"\xff\xd8", "jpg"),
    (b"\x89PNG", "png"),
    (b"RIFF", "webp"),
)


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
    columns, total, rows = _open_table(path)
    wanted = [image_column, caption_column, label_column, key_column, *json_columns]
    for column in filter(None, wanted):
        if column not in columns:
            raise DataError(f"{path}: no column {column!r}; the columns are {', '.join(columns)}")
    left_out: list[str] = []

    def samples() -> Iterator[tuple[str, dict[str, Any]]]:
        for number, row in enumerate(rows):
            try:
                parts = _image(row[image_column], path.parent) | _caption(row[caption_column])
            except DataError as error:
                left_out.append(f"{path} row {number}: {error}")
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
    return replace(packed, left_out=tuple(left_out))


def _open_table(path: Path) -> tuple[list[str], int, Iterator[Row]]:
    """Column names, number of rows (0: unknown) and the rows."""
    if not path.is_file():
        raise DataError(f"{path}: no such table")
    ending = path.suffix.lower()
    if ending == ".parquet":
        file = pq.ParquetFile(path)
        rows = (row for batch in file.iter_batches(batch_size=256) for row in batch.to_pylist())
        return file.schema_arrow.names, file.metadata.num_rows, rows
    if ending not in (".csv", ".tsv"):
        raise DataError(f"{path}: a table is .csv, .tsv or .parquet")
    delimiter = "\t" if ending == ".tsv" else ","
    with path.open(newline="", encoding="utf-8-sig") as file:
        columns = next(csv.reader(file, delimiter=delimiter), [])
    return columns, 0, _iter_csv(path, delimiter)


def _iter_csv(path: Path, delimiter: str) -> Iterator[Row]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        yield from csv.DictReader(file, delimiter=delimiter)


def _image(value: Any, folder: Path) -> dict[str, Any]:
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, str) and value:
        try:
            value = (folder / value).read_bytes()
        except OSError as error:
            raise DataError(f"{value}: {error.strerror}") from None
    if not isinstance(value, bytes) or image_size(value) == (0, 0):
        raise DataError("no image")
    endings = [ending for magic, ending in _ENDING_OF_MAGIC if value.startswith(magic)]
    if not endings:
        raise DataError("an image of another kind than JPEG, PNG and WebP")
    return {endings[0]: value}


def _caption(value: Any) -> dict[str, Any]:
    captions = value if isinstance(value, list) else [value]
    captions = [text for text in captions if isinstance(text, str) and text.strip()]
    if not captions:
        raise DataError("no caption")
    several = {"json": {"captions": captions}} if isinstance(value, list) else {}
    return {"txt": captions[0], **several}
