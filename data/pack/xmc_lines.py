"""Lines of text files as extreme classification has them: gzipped or not, UTF-8 or latin-1."""

import gzip
import io
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from data.errors import DataError

_BOM = b"\xef\xbb\xbf"


class Lines:
    """Lines of a file, one after the other; only a newline ends one.

    A line that is not UTF-8 is read as latin-1 and counted: old releases mix both.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.number = 0
        """The last line that was read, from 1 on."""
        self.num_latin = 0
        """Lines so far that were not UTF-8."""
        try:
            raw = path.open("rb")
        except OSError as error:
            raise DataError(f"{path}: {error.strerror}") from None
        self._file = gzip.GzipFile(fileobj=raw) if path.name.endswith(".gz") else raw
        self._buffer = io.BufferedReader(self._file, 1 << 20) if self._file is not raw else raw
        self._raw = raw

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        try:
            line = self._buffer.readline()
        except (OSError, EOFError) as error:
            raise DataError(f"{self.path}: breaks off after line {self.number}: {error}") from None
        if not line:
            self.close()
            raise StopIteration
        if not self.number:
            line = line.removeprefix(_BOM)
        self.number += 1
        line = line.rstrip(b"\r\n")
        try:
            return line.decode()
        except UnicodeDecodeError:
            self.num_latin += 1
            return line.decode("latin-1")

    def close(self) -> None:
        """Close the file; the end of it does so too."""
        self._buffer.close()
        self._raw.close()

    def fail(self, what: str) -> NoReturn:
        """DataError about the last line."""
        raise DataError(f"{self.path} line {self.number}: {what}")

    def notes(self) -> list[str]:
        """For people: what was odd."""
        if not self.num_latin:
            return []
        return [f"{self.path.name}: {self.num_latin:,} lines are not UTF-8, read as latin-1"]


class SparseRows:
    """Rows `column:value column:value ...` after a header `N columns`; values of 0 are left out.

    Raises DataError for a wrong header, a column outside, and another number of rows than N.
    """

    def __init__(self, path: Path) -> None:
        self.lines = Lines(path)
        header = next(self.lines, "").split()
        if len(header) != 2 or not all(word.isdecimal() for word in header):
            self.lines.fail(
                f"{' '.join(header)[:60]!r} is no header: two numbers, those of rows and of columns"
            )
        self.num_rows, self.num_columns = map(int, header)

    def __iter__(self) -> Iterator[tuple[list[int], list[float]]]:
        for line in rows_of(self.lines, self.num_rows):
            yield parse_pairs(self.lines, line.split(), self.num_columns)


def rows_of(lines: Lines, num_rows: int) -> Iterator[str]:
    """Exactly the lines that the header has announced; empty ones may follow."""
    num = 0
    for line in lines:
        if num < num_rows:
            yield line
            num += 1
        elif line and not line.isspace():
            lines.fail(f"the header says {num_rows:,} rows, and more follow")
    if num < num_rows:
        raise DataError(f"{lines.path}: the header says {num_rows:,} rows, the file has {num:,}")


def parse_pairs(lines: Lines, words: list[str], num_columns: int) -> tuple[list[int], list[float]]:
    """Columns and values of the words `column:value`."""
    columns, values = list[int](), list[float]()
    try:
        for word in words:
            column, colon, value = word.partition(":")
            if not colon:
                raise ValueError(word)
            if float(value) > 0:
                columns.append(int(column))
                values.append(float(value))
    except ValueError:
        lines.fail(f"{word!r} is not column:value")
    check_columns(lines, columns, num_columns, "column")
    return columns, values


def check_columns(lines: Lines, columns: list[int], num_columns: int, what: str) -> None:
    """DataError naming a column outside [0, num_columns)."""
    if columns and not 0 <= min(columns) <= max(columns) < num_columns:
        wrong = next(column for column in columns if not 0 <= column < num_columns)
        lines.fail(
            f"{what} {wrong}, and the header says {num_columns:,}: they count from 0 to "
            f"{num_columns - 1}"
        )
