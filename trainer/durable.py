"""Files that are on the disk when they are said to be, with the checksum of what was meant."""

import contextlib
import hashlib
import json
import logging
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

import torch
from torch import Tensor

_PIECE = 2**26  # bytes written or copied from a device at a time
_MOST_KEPT = 2**24  # bytes of lines that a full disk has refused
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
logger = logging.getLogger("nsphere.durable")

_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class HashingFile:
    """A file object that hashes what it writes, so that no byte is read back to be summed."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._digest, self._size = file, hashlib.sha256(), 0
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        self._digest.update(data)
        self._size += memoryview(data).nbytes
        try:
            return self._file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self._file.flush()

    def record(self) -> tuple[int, str]:
        return self._size, self._digest.hexdigest()


@dataclass(frozen=True)
class RowStream:
    """A tensor to be written that is never whole in memory: its rows, some at a time."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    blocks: Iterator[Tensor]  # each (k, *shape[1:]), shape[0] rows in all

    @property
    def nbytes(self) -> int:
        """Size of the whole."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_file(path: Path, item: Any) -> tuple[int, str]:
    """Write `item` as its ending says, flush it to the disk; its (size, SHA-256 in hex)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        hashing = HashingFile(file)
        if path.suffix == ".json":
            hashing.write(json.dumps(item, indent=1).encode())
        elif path.suffix == ".toml":
            hashing.write(item.encode())
        elif path.suffix == ".safetensors":
            _write_tensors(item, hashing)
        elif isinstance(item, bytes):
            hashing.write(item)
        else:
            _torch_save(item, hashing)
        file.flush()
        os.fsync(file.fileno())
    return hashing.record()


def _write_tensors(tensors: Mapping[str, Tensor | RowStream], hashing: HashingFile) -> None:
    """The safetensors format, a piece at a time: its own writers copy everything first."""
    header: dict[str, Any] = {}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    hashing.write(len(text).to_bytes(8, "little") + text)
    for name, tensor in tensors.items():
        if isinstance(tensor, Tensor):
            _write_pieces(tensor, hashing)
            continue
        missing = tensor.nbytes
        for block in tensor.blocks:
            _write_pieces(block.to(tensor.dtype), hashing)
            missing -= block.numel() * tensor.dtype.itemsize
        if missing:
            raise RuntimeError(f"{name}: {missing} bytes of {tensor.nbytes} were not given")


def _write_pieces(tensor: Tensor, hashing: HashingFile) -> None:
    flat = tensor.detach().contiguous().flatten()
    step = max(1, _PIECE // max(1, flat.element_size()))
    for piece in flat.split(step) if len(flat) else ():
        hashing.write(memoryview(piece.cpu().view(torch.uint8).numpy()))  # type: ignore[arg-type]


@dataclass(frozen=True)
class TensorFile:
    """A safetensors file whose rows are read without mapping or loading the whole."""

    path: Path
    start: int  # of the data in the file
    header: Mapping[str, Any]

    @classmethod
    def open(cls, path: Path) -> "TensorFile":
        """Read the header alone."""
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            return cls(path, 8 + size, json.loads(file.read(size)))

    def dtype(self, name: str) -> torch.dtype:
        """Of a tensor."""
        return _DTYPES[self.header[name]["dtype"]]

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of a tensor's first dimension, in memory of their own."""
        entry = self.header[name]
        shape = [stop - start, *entry["shape"][1:]]
        out = torch.empty(shape, dtype=self.dtype(name))
        if out.numel():
            width = out.nbytes // len(out)
            with self.path.open("rb") as file:
                file.seek(self.start + entry["data_offsets"][0] + start * width)
                read = file.readinto(memoryview(out.flatten().view(torch.uint8).numpy()))  # type: ignore[arg-type]
            if read != out.nbytes:
                raise OSError(f"{self.path}: ends inside {name}: {read} bytes of {out.nbytes}")
        return out

    def whole(self) -> dict[str, Tensor]:
        """Every tensor."""
        tensors = {}
        for name, entry in self.header.items():
            if name != "__metadata__":
                shape = entry["shape"]
                length = shape[0] if shape else 1
                tensors[name] = self.rows(name, 0, length).reshape(shape)
        return tensors


def _torch_save(item: Any, hashing: HashingFile) -> None:
    try:
        torch.save(item, cast(IO[bytes], hashing))
    except RuntimeError:  # torch says "unexpected pos" for whatever the disk had said
        if hashing.error is not None:
            raise hashing.error from None
        raise


class LineFile:
    """A file of lines that outlives a full disk: what it refuses is kept, and written later.

    A refusal is a warning, once until it is over; it never raises. Close loses what is still kept,
    with a warning that says how much.
    """

    def __init__(self, path: Path) -> None:
        """Open for appending; raises OSError."""
        self._path = path
        self._fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        self._kept = bytearray()
        self._dropped = 0  # lines
        self._refused = False

    def write(self, line: str) -> None:
        """Append a line, after those that could not be written before."""
        if len(self._kept) < _MOST_KEPT:
            self._kept += line.encode() + b"\n"
        else:
            self._dropped += 1
        try:
            while self._kept:
                del self._kept[: os.write(self._fd, self._kept)]
        except OSError as error:
            if not self._refused:
                logger.warning(
                    "%s: %s: its lines are kept in memory until they can be written",
                    *(self._path, error.strerror),
                )
            self._refused = True
            return
        if self._refused:
            lost = f", {self._dropped} are lost" if self._dropped else ""
            logger.warning("%s: the lines that were kept are written%s", self._path, lost)
            self._refused, self._dropped = False, 0

    def close(self) -> None:
        """Close; a second call does nothing."""
        if self._fd < 0:
            return
        lost = self._kept.count(b"\n") + self._dropped
        if lost:
            logger.warning("%s: %d lines could not be written and are lost", self._path, lost)
        os.close(self._fd)
        self._fd = -1


def remove(path: Path) -> None:
    """A file, a link or a whole folder; what refuses stays."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
        return
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)


def flush_folder(folder: Path) -> None:
    """Make the names in a folder last: a file that is flushed can still lack its entry."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
