"""Texts with lists of labels, in every format that extreme classification is published in.

Parquet with list columns; JSON lines, sparse text (trn_X_Y.txt) and filter lists of the extreme
classification repository; its older bags of features; .npz matrices (also SMAT) beside raw texts.
Formats: manikvarma.github.io/downloads/XC/XMLRepository.html.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pyarrow.parquet as pq

from data.errors import DataError
from data.pack.folder import plain_key
from data.pack.table import open_table
from data.pack.xmc_lines import Lines, SparseRows, check_columns, parse_pairs, rows_of
from data.pack.xmc_matrix import MatrixRows

Format = Literal["auto", "parquet", "json", "sparse", "bag", "npz"]
JOIN = ": "
"""Between the columns that make one text."""
_TEXT_COLUMNS = {"parquet": ("text",), "json": ("title", "content")}


class Document(NamedTuple):
    """One row of a data set."""

    key: str
    text: str
    labels: Sequence[int]
    """As the file has them."""


@dataclass(frozen=True)
class Documents:
    """The rows of a file, to be read once."""

    path: Path
    rows: Iterator[Document]
    num_rows: int
    """0 when it is not known before the end."""
    num_labels: int = 0
    """As the header or shape says; 0 when it says nothing."""
    notes: Callable[[], list[str]] = list
    """For people, after the end: what was odd."""


class Reading(NamedTuple):
    """How a file of documents is read; what does not concern its format is an error."""

    format: Format = "auto"
    text_columns: tuple[str, ...] = ()
    """parquet, json: columns whose joined values are the text; none: text, or title and content."""
    labels_column: str = "labels"
    """parquet."""
    key_column: str = ""
    """parquet, json: column of the samples' keys; empty: row numbers, as filter lists count."""
    texts: Path | None = None
    """sparse, npz: a line a document; None: trn_X.txt beside trn_X_Y.txt, and the like."""
    features: Path | None = None
    """sparse, npz: a matrix of features in the place of texts: sparse text or .npz."""
    vocabulary: Path | None = None
    """bag, features: names of the features, a line each; None: f0, f1, ..."""
    repeat: bool = False
    """bag, features: name a feature as often as its value says (rounded, at least once); else once.
    Weights such as tf-idf mean nothing to a bag of words."""


def open_documents(path: str | Path, reading: Reading) -> Documents:
    """The rows of a data set. Raises DataError for a file that is not of its format."""
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    kind = find_format(path) if reading.format == "auto" else reading.format
    _check_options(kind, reading)
    return _OPEN[kind](path, reading)


def find_format(path: Path) -> str:
    """What a file's name and first line say that it is."""
    name = path.name.removesuffix(".gz").lower()
    if name.endswith((".parquet", ".npz")):
        return name.rpartition(".")[2]
    if name.endswith((".json", ".jsonl")):
        return "json"
    lines = Lines(path)
    header = next(lines, "").split()
    lines.close()
    if len(header) in (2, 3) and all(word.isdecimal() for word in header):
        return "sparse" if len(header) == 2 else "bag"
    raise DataError(
        f"{path}: neither .parquet, .json(.gz) nor .npz, nor a text file whose first line is "
        "`rows labels` or `rows features labels`: name its --format"
    )


def join_text(values: Iterable[Any]) -> str:
    """The texts that are there, joined."""
    texts = [str(value).strip() for value in values if value is not None]
    return JOIN.join(text for text in texts if text)


def find_beside(path: Path, names: Sequence[str]) -> Path | None:
    """The first of these files in a file's folder or the folder `raw` there, gzipped or not."""
    for folder in (path.parent, path.parent / "raw"):
        for name in names:
            for found in (folder / name, folder / f"{name}.gz"):
                if found.is_file():
                    return found
    return None


def _check_options(kind: str, reading: Reading) -> None:
    """DataError for an option that this format cannot heed."""
    tables, matrices = ("parquet", "json"), ("sparse", "npz")
    for given, name, heeding in (
        (reading.text_columns, "--text-columns", tables),
        (reading.key_column, "--key-column", tables),
        (reading.texts, "--texts", matrices),
        (reading.features, "--features", matrices),
        (reading.vocabulary, "--vocabulary", (*matrices, "bag")),
        (reading.repeat, "--repeat", (*matrices, "bag")),
    ):
        if given and kind not in heeding:
            raise DataError(f"{name} is for the formats {', '.join(heeding)}, and this is {kind}")
    if reading.texts and reading.features:
        raise DataError("give --texts or --features, not both")
    if kind in matrices and (reading.vocabulary or reading.repeat) and not reading.features:
        raise DataError("--vocabulary and --repeat are about --features, and none are given")


def _open_parquet(path: Path, reading: Reading) -> Documents:
    columns = reading.text_columns or _TEXT_COLUMNS["parquet"]
    wanted = [*columns, reading.labels_column, *filter(None, [reading.key_column])]
    num_rows, rows = open_table(path, wanted)
    kind = pq.read_schema(path).field(reading.labels_column).type
    if not str(kind).startswith(("list", "large_list", "fixed_size_list")):
        raise DataError(
            f"{path}: the column {reading.labels_column!r} holds {kind}, not lists of integers"
        )

    def documents() -> Iterator[Document]:
        for number, row in enumerate(rows):
            labels = row[reading.labels_column] or ()
            _check_integers(f"{path} row {number}", labels)
            yield Document(
                _key(row, reading.key_column, number), join_text(map(row.get, columns)), labels
            )

    return Documents(path, documents(), num_rows)


def _open_json(path: Path, reading: Reading) -> Documents:
    columns = reading.text_columns or _TEXT_COLUMNS["json"]
    lines = Lines(path)

    def documents() -> Iterator[Document]:
        for number, row in enumerate(iter_json(lines)):
            labels = row.get("target_ind")
            weights = row.get("target_rel")
            if not isinstance(labels, list):
                lines.fail("no list target_ind of labels")
            _check_integers(f"{path} line {lines.number}", labels)
            if weights is not None:
                if not isinstance(weights, list) or len(weights) != len(labels):
                    lines.fail(f"target_rel is no list of {len(labels)} weights, as target_ind has")
                labels = [x for x, weight in zip(labels, weights, strict=True) if weight > 0]
            if reading.text_columns and not any(column in row for column in columns):
                lines.fail(f"no field {' or '.join(columns)}; the fields are {', '.join(row)}")
            text = join_text(map(row.get, columns))
            yield Document(_key(row, reading.key_column, number), text, labels)

    return Documents(path, documents(), 0, notes=lines.notes)


def iter_json(lines: Lines) -> Iterator[dict[str, Any]]:
    """The object of each line, empty lines passed over."""
    for line in lines:
        if not line or line.isspace():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            lines.fail(f"the JSON does not parse: {error}")
        if not isinstance(row, dict):
            lines.fail("the JSON is no object")
        yield row


def _open_sparse(path: Path, reading: Reading) -> Documents:
    rows = SparseRows(path)
    return _with_texts(path, rows, reading, [rows.lines])


def _open_npz(path: Path, reading: Reading) -> Documents:
    return _with_texts(path, MatrixRows(path), reading, [])


def _with_texts(
    path: Path, rows: SparseRows | MatrixRows, reading: Reading, files: list[Lines]
) -> Documents:
    """Labels of a matrix with the texts, or named features, of the same rows."""
    if reading.features:
        texts = _feature_texts(reading.features, reading, files, rows.num_rows)
        source = reading.features
    else:
        source = reading.texts or _texts_beside(path)
        files.append(Lines(source))
        texts = files[-1]

    def documents() -> Iterator[Document]:
        number = 0
        for number, (labels, _) in enumerate(rows, 1):
            text = next(texts, None)
            if text is None:
                raise DataError(
                    f"{source}: ends after {number - 1:,} texts, and {path} has "
                    f"{rows.num_rows:,} rows"
                )
            yield Document(row_key(number - 1), text.strip(), labels)
        if next((text for text in texts if text and not text.isspace()), None) is not None:
            raise DataError(f"{source}: has more texts than {path} has rows ({number:,})")

    return Documents(
        path,
        documents(),
        rows.num_rows,
        rows.num_columns,
        lambda: [note for lines in files for note in lines.notes()],
    )


def _texts_beside(path: Path) -> Path:
    split = next((name for name in ("trn", "tst") if name in path.name), "")
    names = [f"{split}_X.txt", f"X.{split}.txt"]
    found = find_beside(path, names) if split else None
    if found is None:
        raise DataError(
            f"{path} has labels only"
            + (f", and neither {' nor '.join(names)} lies beside it" if split else "")
            + ": name the documents' texts with --texts, or --features with --vocabulary"
        )
    return found


def _feature_texts(
    path: Path, reading: Reading, files: list[Lines], num_rows: int
) -> Iterator[str]:
    if path.suffix == ".npz":
        rows: SparseRows | MatrixRows = MatrixRows(path)
    else:
        rows = SparseRows(path)
        files.append(rows.lines)
    if rows.num_rows != num_rows:
        raise DataError(f"{path} has {rows.num_rows:,} rows of features for {num_rows:,} of labels")
    names = _Names(reading, rows.num_columns, files)
    return (names.text(columns, values) for columns, values in rows)


def _open_bag(path: Path, reading: Reading) -> Documents:
    lines = Lines(path)
    header = next(lines, "").split()
    if len(header) != 3 or not all(word.isdecimal() for word in header):
        lines.fail(f"{' '.join(header)[:60]!r} is no header: numbers of rows, features and labels")
    num_rows, num_features, num_labels = map(int, header)
    files = [lines]
    names = _Names(reading, num_features, files)

    def documents() -> Iterator[Document]:
        for number, line in enumerate(rows_of(lines, num_rows)):
            first, *words = line.split(" ") if line else [""]
            if ":" in first:  # no label, and no blank that says so
                first, words = "", [first, *words]
            try:
                labels = [int(label) for label in first.split(",") if label.strip()]
            except ValueError:
                lines.fail(f"{first[:60]!r} are no labels with commas between")
            check_columns(lines, labels, num_labels, "label")
            words = [word for word in words if word and not word.isspace()]
            features, values = parse_pairs(lines, words, num_features)
            yield Document(row_key(number), names.text(features, values), labels)

    return Documents(
        path,
        documents(),
        num_rows,
        num_labels,
        lambda: [note for each in files for note in each.notes()],
    )


class _Names:
    """Feature numbers and values -> a text of the features' names."""

    def __init__(self, reading: Reading, num_features: int, files: list[Lines]) -> None:
        self._repeat = reading.repeat
        self._names: list[str] = []
        if reading.vocabulary:
            lines = Lines(reading.vocabulary)
            files.append(lines)
            self._names = [line.strip() for line in lines]
            if len(self._names) != num_features:
                raise DataError(
                    f"{reading.vocabulary}: {len(self._names):,} names for {num_features:,} "
                    "features"
                )

    def text(self, features: Sequence[int], values: Sequence[float]) -> str:
        names = [self._names[i] if self._names else f"f{i}" for i in features]
        if self._repeat:
            times = [max(1, round(value)) for value in values]
            names = [name for name, num in zip(names, times, strict=True) for _ in range(num)]
        return " ".join(names)


def row_key(number: int) -> str:
    """The key of a document by its row, from 0 on."""
    return f"{number:09d}"


def _key(row: dict[str, Any], column: str, number: int) -> str:
    if column and column not in row:
        raise DataError(f"no field {column!r} for keys; the fields are {', '.join(row)}")
    return plain_key(str(row[column])) if column else row_key(number)


def _check_integers(origin: str, labels: Sequence[Any]) -> None:
    for label in labels:
        if type(label) is not int:
            raise DataError(f"{origin}: {label!r} among its labels is no integer")


_OPEN: dict[str, Callable[[Path, Reading], Documents]] = {
    "parquet": _open_parquet,
    "json": _open_json,
    "sparse": _open_sparse,
    "bag": _open_bag,
    "npz": _open_npz,
}
