"""Sparse matrices in .npz files as scipy writes them (also PECOS's SMAT), read without scipy."""

import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data.errors import DataError

Int64s = NDArray[np.int64]


class MatrixRows:
    """A csr, csc or coo matrix row by row; the whole of it stands in memory. Entries of 0 or less
    are left out, as in the text form.

    Raises DataError for a file that is none, and for indices outside its shape.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
            self.num_rows, self.num_columns = map(int, arrays["shape"])
            rows, self._columns, self._values = _entries(arrays)
        except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
            raise DataError(
                f"{path}: no sparse matrix of scipy's (csr, csc or coo): {error}"
            ) from None
        self._check(rows)
        self._starts = np.searchsorted(rows, np.arange(self.num_rows + 1))

    def __iter__(self) -> Iterator[tuple[list[int], list[float]]]:
        for row in range(self.num_rows):
            first, last = self._starts[row], self._starts[row + 1]
            yield self._columns[first:last].tolist(), self._values[first:last].tolist()

    def _check(self, rows: Int64s) -> None:
        for found, size, what in (
            (rows, self.num_rows, "row"),
            (self._columns, self.num_columns, "column"),
        ):
            if len(found) and not 0 <= found.min() <= found.max() < size:
                raise DataError(
                    f"{self.path}: an entry in {what} {found.min()} or {found.max()}, and the "
                    f"shape says {size:,}"
                )


def _entries(arrays: dict[str, np.ndarray]) -> tuple[Int64s, Int64s, np.ndarray]:
    """(rows ascending, columns, values) of the entries above 0."""
    kind = arrays["format"].item()
    kind = kind.decode() if isinstance(kind, bytes) else kind
    values = arrays["data"]
    if kind == "coo":
        rows, columns = arrays["row"], arrays["col"]
    elif kind in ("csr", "csc"):
        counts = np.diff(arrays["indptr"])
        major = np.repeat(np.arange(len(counts)), counts)
        rows, columns = (major, arrays["indices"]) if kind == "csr" else (arrays["indices"], major)
    else:
        raise ValueError(f"format {kind!r}")
    if not len(rows) == len(columns) == len(values):
        raise ValueError(f"{len(rows)} rows, {len(columns)} columns, {len(values)} values")
    kept = np.flatnonzero(values > 0)
    order = kept[np.argsort(rows[kept], kind="stable")]
    return rows[order].astype(np.int64), columns[order].astype(np.int64), values[order]
