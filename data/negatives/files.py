"""Folders of arrays that are on the disk when they are said to be, or do not exist."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.errors import DataError

Array = NDArray[Any]
_PIECE = 1 << 26  # bytes hashed or written at a time


def save_arrays(folder: Path, name: str, arrays: Mapping[str, Array], header: Any) -> str:
    """Write `folder` whole or not at all: `NAME.npy` each and `name` (JSON); the SHA-256 of both.

    A folder that is there already is replaced; a kill in between may leave neither, never a part.
    """
    draft = folder.with_name(f".{folder.name}.{os.getpid()}.draft")
    old = folder.with_name(f".{folder.name}.{os.getpid()}.old.draft")
    for left in folder.parent.glob(f".{folder.name}.*.draft"):  # by a process that was killed
        shutil.rmtree(left, ignore_errors=True)
    draft.mkdir(parents=True)
    try:
        sums = {key: _write_array(draft / f"{key}.npy", array) for key, array in arrays.items()}
        digest = digest_of(header, sums)
        text = json.dumps({**header, "arrays": sums, "sha256": digest}, indent=1)
        with (draft / name).open("w", encoding="utf-8") as file:
            file.write(text + "\n")
            _flush(file.fileno(), file.flush)
        flush_folder(draft)
        if folder.exists():  # out of the way in one move: a kill must not leave half of it
            os.replace(folder, old)
        os.replace(draft, folder)
        flush_folder(folder.parent)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
    return digest


def load_arrays(
    folder: Path, name: str, *, verify: bool = True
) -> tuple[dict[str, Any], dict[str, Array]]:
    """Header and memory-mapped arrays; DataError where anything is missing, torn or changed."""
    header = read_header(folder, name)
    arrays = {}
    for key, want in header.pop("arrays").items():
        path = folder / f"{key}.npy"
        try:
            arrays[key] = np.load(path, mmap_mode="r")
        except (OSError, ValueError, EOFError) as error:
            raise _torn(folder, f"{path.name} cannot be read: {error}") from None
        if verify and hash_array(arrays[key]) != want:
            raise _torn(folder, f"{path.name} is not what was written")
    return header, arrays


def read_header(folder: Path, name: str) -> dict[str, Any]:
    """The JSON of a folder; DataError where it is none or does not agree with itself."""
    try:
        header: dict[str, Any] = json.loads((folder / name).read_text(encoding="utf-8"))
        rest = {key: header[key] for key in header if key not in ("arrays", "sha256")}
        agrees = digest_of(rest, header["arrays"]) == header["sha256"]
    except (OSError, ValueError, KeyError) as error:
        raise _torn(folder, f"no {name}: {error}") from None
    if not agrees:
        raise _torn(folder, f"{name} is not what was written")
    return header


def digest_of(header: Any, sums: Mapping[str, str]) -> str:
    """SHA-256 of a header and the arrays it speaks of."""
    return hashlib.sha256(json.dumps([header, sums], sort_keys=True).encode()).hexdigest()


def hash_array(array: Array) -> str:
    """SHA-256 of type, shape and values."""
    state = _begin(array)
    for piece in _pieces(array):
        state.update(piece.data)
    return str(state.hexdigest())


def flush_folder(folder: Path) -> None:
    """Make the names in a folder last: a file that is flushed can still lack its entry."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_array(path: Path, array: Array) -> str:
    with path.open("wb") as file:
        header = np.lib.format.header_data_from_array_1_0(np.ascontiguousarray(array[:0]))
        header["shape"] = array.shape
        np.lib.format.write_array_header_1_0(file, header)
        state = _begin(array)
        for piece in _pieces(array):
            state.update(piece.data)
            file.write(piece.data)
        _flush(file.fileno(), file.flush)
    return str(state.hexdigest())


def _begin(array: Array) -> Any:
    return hashlib.sha256(f"{array.dtype.str}{array.shape}".encode())


def _pieces(array: Array) -> Iterator[NDArray[np.uint8]]:
    rows = max(1, _PIECE // max(1, array[:1].nbytes))
    for start in range(0, len(array), rows):
        # A copy, as others may write to a memory map between its hash and its file.
        piece = np.array(array[start : start + rows], order="C")
        if piece.size:
            yield piece.reshape(-1).view(np.uint8)


def _flush(descriptor: int, flush: Any) -> None:
    flush()
    os.fsync(descriptor)


def _torn(folder: Path, what: str) -> DataError:
    return DataError(
        f"{folder}: {what}; the folder is incomplete or damaged: delete it, and it is made anew"
    )
