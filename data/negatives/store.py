"""Embeddings of every sample, by id: what training steps write and plans are made from.

A store is one folder on the planner's machine: `rows.f16` (num_rows, dim) and `steps.i32`
(num_rows,), both memory-mapped, so that several processes of a machine write their own rows without
locks and 50 million rows of 64 columns are 6.6 GB of page cache. While a row is being written its
step is `TORN`, so a process killed in between leaves rows that count as unseen, never half-written
ones. Plans are not made from a store but from a `Snapshot` of it, which never changes.
"""

import json
import os
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data.errors import DataError
from data.negatives.files import hash_array, load_arrays, save_arrays
from data.negatives.tree import not_finite, read_rows
from data.order import derive_key

Int64s = NDArray[np.int64]
Int32s = NDArray[np.int32]
Floats = NDArray[np.float32]

STORE_FORMAT = 1
UNSEEN, TORN = -1, -2
"""Steps of rows that were never written, and of rows whose writing was cut off."""

_HEADER = "store.json"
_SNAPSHOT = "snapshot.json"
_PROJECTION = 33  # what a key is for


class Snapshot(NamedTuple):
    """A store as it was at one moment."""

    rows: NDArray[np.float16]  # (N, d) by sample id
    steps: Int32s  # (N,) step at which each row was written, negative where it was not
    fingerprint: str
    """Of the data set."""
    sha256: str
    """Of all of it: plans carry it."""

    @classmethod
    def of(cls, rows: Any, steps: Any = None, fingerprint: str = "") -> "Snapshot":
        """A snapshot in memory, of (N, d) embeddings; without `steps` all are of step 0."""
        half = np.asarray(rows, np.float16)
        when = np.zeros(len(half), np.int32) if steps is None else np.asarray(steps, np.int32)
        return cls(half, when, fingerprint, hash_array(half) + hash_array(when))

    @classmethod
    def load(
        cls, folder: Path, fingerprint: str | None = None, *, verify: bool = True
    ) -> "Snapshot":
        """Open a snapshot, memory-mapped.

        Raises DataError where it is torn, changed, or of another data set than `fingerprint`.
        """
        header, arrays = load_arrays(folder, _SNAPSHOT, verify=verify)
        check_fingerprint(folder, header["fingerprint"], fingerprint)
        return cls(arrays["rows"], arrays["steps"], header["fingerprint"], header["sha256"])

    @property
    def seen(self) -> NDArray[np.bool_]:  # (N,)
        """Rows that have an embedding."""
        return self.steps >= 0

    @property
    def fill(self) -> float:
        """Share of the rows that have one."""
        return float(self.seen.mean()) if len(self.steps) else 0.0

    def read(self, ids: Int64s) -> Floats:  # (n, d)
        """Embeddings by id; those of unseen rows mean nothing."""
        return read_rows(self.rows, ids)


class EmbeddingStore:
    """The store of one side of a data set; `create` or `open` it."""

    def __init__(self, folder: Path, header: dict[str, Any], *, writable: bool = True) -> None:
        self.folder = folder
        self.num_rows, self.dim = int(header["num_rows"]), int(header["dim"])
        self.fingerprint = str(header["fingerprint"])
        mode: Literal["r+", "r"] = "r+" if writable else "r"
        # Row after row in its own place, whatever order they are written in.
        self._rows: NDArray[np.float16] = np.memmap(
            str(folder / "rows.f16"), np.float16, mode, shape=(self.num_rows, self.dim)
        )
        self.steps: Int32s = np.memmap(
            str(folder / "steps.i32"), np.int32, mode, shape=(self.num_rows,)
        )
        """Step at which each row was written; `UNSEEN`, `TORN`."""

    @classmethod
    def create(
        cls, folder: Path, num_rows: int, dim: int, *, fingerprint: str = ""
    ) -> "EmbeddingStore":
        """A new store without a seen row; one that is there is emptied.

        Raises DataError where the disk has no room for all of it.
        """
        folder.mkdir(parents=True, exist_ok=True)
        (folder / _HEADER).unlink(missing_ok=True)
        if num_rows < 1 or dim < 1:
            raise DataError(
                f"{folder}: a store of {num_rows:,} rows of {dim} columns holds nothing"
            )
        _empty_file(folder / "rows.f16", num_rows * dim * 2)
        _empty_file(folder / "steps.i32", num_rows * 4)
        steps = np.memmap(folder / "steps.i32", np.int32, "r+", shape=(num_rows,))
        steps[:] = UNSEEN
        steps.flush()
        header = {
            "format": STORE_FORMAT, "num_rows": num_rows, "dim": dim, "fingerprint": fingerprint,
        }  # fmt: skip
        draft = folder / f".{_HEADER}.draft"
        draft.write_text(json.dumps(header, indent=1) + "\n", encoding="utf-8")
        os.replace(draft, folder / _HEADER)  # last: a folder without it is no store
        return cls(folder, header)

    @classmethod
    def open(
        cls, folder: Path, fingerprint: str | None = None, *, writable: bool = True
    ) -> "EmbeddingStore":
        """A store that is there.

        Raises DataError where there is none, where its files have another size than they say, and
        where it is of another data set than `fingerprint`.
        """
        try:
            header = json.loads((folder / _HEADER).read_text(encoding="utf-8"))
            if header["format"] != STORE_FORMAT:
                raise DataError(
                    f"{folder}: a store of format {header['format']}, this is {STORE_FORMAT}: "
                    "delete it, and it is filled anew"
                )
            sizes = {"rows.f16": 2 * header["num_rows"] * header["dim"],
                     "steps.i32": 4 * header["num_rows"]}  # fmt: skip
            found = {name: (folder / name).stat().st_size for name in sizes}
        except (OSError, ValueError, KeyError, TypeError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"{folder}: no embedding store ({error})") from None
        if found != sizes:
            raise DataError(
                f"{folder}: files of {found} bytes where {sizes} are meant: the store is damaged; "
                "delete it, and it is filled anew"
            )
        check_fingerprint(folder, header["fingerprint"], fingerprint)
        return cls(folder, header, writable=writable)

    def write(
        self,
        ids: Int64s,  # (n,) samples, each once
        rows: Floats,  # (n, dim)
        step: int,
    ) -> None:
        """Write embeddings of `step`. Raises DataError for NaN, naming samples, and wrong shape."""
        ids, wide = np.asarray(ids, np.int64), np.asarray(rows, np.float32)
        if wide.shape != (len(ids), self.dim):
            raise DataError(
                f"{self.folder}: embeddings of shape {wide.shape} for {len(ids):,} samples; rows "
                f"here have {self.dim} columns: project wider ones (`project`)"
            )
        if len(ids) and not 0 <= ids.min() <= ids.max() < self.num_rows:
            raise DataError(
                f"{self.folder}: samples {ids.min()} to {ids.max()}, and it has the rows 0 to "
                f"{self.num_rows - 1}: the store is of another data set"
            )
        with np.errstate(over="ignore"):
            half = wide.astype(np.float16)
        finite = np.isfinite(half).all(axis=1)
        if not finite.all():
            raise not_finite(ids[~finite])
        self.steps[ids] = TORN
        self._rows[ids] = half
        self.steps[ids] = step

    def read(self, which: slice | Int64s) -> Floats:  # (n, dim)
        """Embeddings of samples; those of unseen rows mean nothing."""
        ids = np.arange(self.num_rows)[which] if isinstance(which, slice) else which
        return read_rows(self._rows, ids)

    def restore(self, start: int, rows: NDArray[np.float16], steps: Int32s) -> None:
        """Put back rows [start, start + n) and their steps, bit for bit, as `part` gave them."""
        stop = start + len(steps)
        if rows.shape != (len(steps), self.dim) or stop > self.num_rows:
            raise DataError(
                f"{self.folder}: rows {start} to {stop} of shape {rows.shape} do not fit into "
                f"{self.num_rows:,} rows of {self.dim} columns: they are of another store"
            )
        self._rows[start:stop] = rows
        self.steps[start:stop] = steps

    def part(self, start: int, stop: int) -> tuple[NDArray[np.float16], Int32s]:
        """Rows [start, stop) and their steps as they are stored; copies."""
        return np.array(self._rows[start:stop]), np.array(self.steps[start:stop])

    def forget(self) -> None:
        """Every row is unseen again."""
        self.steps[:] = UNSEEN

    @property
    def fill(self) -> float:
        """Share of the rows that have an embedding."""
        return float((self.steps >= 0).mean())

    def ages(self, step: int) -> Int64s:  # (seen,)
        """Steps since each seen row was written."""
        seen = self.steps[self.steps >= 0]
        return step - seen.astype(np.int64)

    def drift(self, ids: Int64s, rows: Floats) -> float:
        """Mean of 1 - cosine between fresh embeddings of samples and what is stored of them.

        Over the samples that were seen; NaN where none was.
        """
        seen = self.steps[ids] >= 0
        if not seen.any():
            return float("nan")
        fresh, stored = unit_rows(rows[seen]), unit_rows(self.read(ids[seen]))
        return float(1 - np.einsum("nd,nd->n", fresh, stored).mean())

    def flush(self) -> None:
        """Wait until everything written is on the disk."""
        for array in (self._rows, self.steps):
            if isinstance(array, np.memmap):
                array.flush()

    def snapshot(self, folder: Path) -> Snapshot:
        """A durable copy that later writes do not touch; the folder is whole or not there."""
        steps = np.array(self.steps)
        arrays: dict[str, NDArray[Any]] = {"rows": self._rows, "steps": steps}
        header = {"format": STORE_FORMAT, "fingerprint": self.fingerprint}
        save_arrays(folder, _SNAPSHOT, arrays, header)
        return Snapshot.load(folder, self.fingerprint, verify=False)


def check_fingerprint(folder: Path, found: str, wanted: str | None) -> None:
    """DataError where something made from one data set is used with another."""
    if wanted is not None and found != wanted:
        raise DataError(
            f"{folder}: made from another data set (fingerprint {found[:12] or 'none'}, this one's "
            f"is {wanted[:12] or 'none'}): the samples it names are not these; delete it or give "
            "the shards it was made from"
        )


def unit_rows(rows: Floats) -> Floats:
    """Rows of length 1; a zero row stays one."""
    lengths: Floats = np.linalg.norm(rows, axis=1, keepdims=True)
    lengths[lengths == 0] = 1
    return rows / lengths


def project(
    rows: Floats,  # (n, width)
    dim: int,
    seed: int,
) -> Floats:  # (n, min(width, dim)) unit rows
    """Embeddings as a store of `dim` columns keeps them: wider ones by a fixed random projection.

    Cosines keep their order to about 1 / sqrt(dim) (Johnson and Lindenstrauss 1984).
    """
    rows = np.asarray(rows, np.float32)
    if rows.shape[1] > dim:
        rows = rows @ projection(rows.shape[1], dim, seed)
    return unit_rows(rows)


@lru_cache(maxsize=8)
def projection(width: int, dim: int, seed: int) -> Floats:  # (width, dim)
    """Orthonormal columns keyed by the seed."""
    keys = derive_key(seed, _PROJECTION, np.arange(2 * width * dim))
    uniform = ((keys >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
    first, second = uniform.reshape(2, width, dim)
    normal = np.sqrt(-2 * np.log(first)) * np.cos(2 * np.pi * second)  # Box and Muller 1958
    columns, triangle = np.linalg.qr(normal)
    return np.asarray(columns * np.sign(np.diagonal(triangle)), np.float32)


def _empty_file(path: Path, size: int) -> None:
    with path.open("wb") as file:
        file.truncate(size)
        try:  # a page that finds the disk full when it is written kills the process: SIGBUS
            os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            file.truncate(0)
            raise DataError(
                f"{path}: {error.strerror}: the embedding store needs {size:,} bytes there"
            ) from None
