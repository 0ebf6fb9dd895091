"""What labels are called, in every format that extreme classification is published in."""

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq

from data.errors import DataError
from data.pack.xmc_lines import Lines
from data.pack.xmc_rows import find_beside, iter_json, join_text

_BESIDE = ("Y.txt", "lbl.json", "labels.tsv", "labels.csv")
_IDS = ("label", "label_id")
_TEXTS = ("label_text", "text", "title", "name")


class LabelTexts(NamedTuple):
    """Texts by label, empty where there is none."""

    path: Path
    texts: list[str]
    notes: list[str]
    """For people: what was odd."""


def read_label_texts(path: Path, columns: Sequence[str] = ()) -> LabelTexts:
    """Label texts of .tsv, .csv, .parquet (columns label or label_id, else by row), .json[.gz]
    (lbl.json), and of any other file a line a label.

    `columns` are joined by ": "; none: the first of label_text, text, title, name. Tab-separated
    files have no quotes. Raises DataError for a column that does not exist, and for a label that
    comes twice.
    """
    name = path.name.removesuffix(".gz").lower()
    if not path.is_file():
        raise DataError(f"{path}: no such file of label texts")
    if name.endswith((".json", ".jsonl")):
        lines = Lines(path)
        return LabelTexts(path, _by_row(path, iter_json(lines), columns), lines.notes())
    if name.endswith(".parquet"):
        rows = pq.read_table(path).to_pylist()
        return LabelTexts(path, _by_row(path, iter(rows), columns), [])
    lines = Lines(path)
    if name.endswith(".tsv"):
        table = csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
        return LabelTexts(path, _by_row(path, table, columns), lines.notes())
    if name.endswith(".csv"):
        return LabelTexts(path, _by_row(path, csv.DictReader(lines), columns), lines.notes())
    if columns:
        raise DataError(f"{path} is a text a line: it has no columns {', '.join(columns)}")
    return LabelTexts(path, [line.strip() for line in lines], lines.notes())


def find_label_texts(documents: Path) -> Path | None:
    """The label texts that lie beside a file of documents, if any do."""
    return find_beside(documents, _BESIDE)


def _by_row(path: Path, rows: Iterator[dict[str, Any]], columns: Sequence[str]) -> list[str]:
    texts: dict[int, str] = {}
    for number, row in enumerate(rows):
        if not number:
            columns = columns or [next((name for name in _TEXTS if name in row), _TEXTS[0])]
            for column in columns:
                if column not in row:
                    raise DataError(
                        f"{path}: no column {column!r}; the columns are {', '.join(map(str, row))}"
                    )
        label = _label(path, row, number)
        if label in texts:
            raise DataError(f"{path}: label {label} stands there twice")
        texts[label] = join_text(row.get(column) for column in columns)
    return [texts.get(label, "") for label in range(max(texts, default=-1) + 1)]


def _label(path: Path, row: dict[str, Any], number: int) -> int:
    value = next((row[name] for name in _IDS if name in row), number)
    try:
        label = int(value)
    except (TypeError, ValueError):
        label = -1
    if label < 0:
        raise DataError(f"{path} row {number}: {value!r} is no label: they count from 0")
    return label
