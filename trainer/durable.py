"""Files that are on the disk when they are said to be, with the checksum of what was meant."""

import hashlib
import json
import os
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

import safetensors.torch
import torch


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
            hashing.write(safetensors.torch.save(item))
        else:
            _torch_save(item, hashing)
        file.flush()
        os.fsync(file.fileno())
    return hashing.record()


def _torch_save(item: Any, hashing: HashingFile) -> None:
    try:
        torch.save(item, cast(IO[bytes], hashing))
    except RuntimeError:  # torch says "unexpected pos" for whatever the disk had said
        if hashing.error is not None:
            raise hashing.error from None
        raise


def flush_folder(folder: Path) -> None:
    """Make the names in a folder last: a file that is flushed can still lack its entry."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
