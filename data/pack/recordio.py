"""MXNet's RecordIO (.rec) without mxnet: parts, records, image headers, and entry at any byte.

A part is `u32 magic, u32 kind << 29 | length`, its payload and zeros up to 4 bytes; a record is one
part (kind 0) or a first, middle and last one (1, 2, 3), cut where its payload held the magic at a
multiple of 4, which is left out there and put back here. So the magic at a multiple of 4 is always
the head of a part, and reading can start anywhere: no index is needed, and memory does not grow
with the number of records. Facts: dmlc-core `recordio.h`, `recordio.cc`; mxnet `recordio.py`.
"""

import math
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from data.errors import DataError

MAGIC = 0xCED7230A
_OLD_MAGIC = 0x3ED7230A  # of the format of 2015, whose lengths have 30 bits
_MAGIC_BYTES = struct.pack("<I", MAGIC)
_PART = struct.Struct("<II")
_HEADER = struct.Struct("<IfQQ")  # flag, label, id, id2; `flag` labels follow where it is not 0
_WHOLE, _FIRST, _MIDDLE, _LAST = range(4)
_LENGTH_BITS = 29
_SCAN_BYTES = 1 << 16  # some records of faces
_BUFFER_BYTES = 1 << 20
_MAX_LABELS = 1 << 16
_LISTED = 1000


class Record(NamedTuple):
    """One record; `offset` is that of its first part."""

    offset: int
    payload: bytes


class ImageRecord(NamedTuple):
    """What MXNet's image header says of a record."""

    offset: int
    labels: tuple[float, ...]
    """float32 values: integers are exact up to 2^24 only."""
    id: int
    flag: int
    image: bytes


class RecordFile:
    """A .rec file; reads with bounded memory, from any place, and survives a fork.

    Opening checks the first and the last record. Raises DataError for other formats and for a file
    that was cut, unless `allow_damage`: then `damage` says what was wrong, and the rest is read.
    """

    def __init__(self, path: str | Path, *, allow_damage: bool = False) -> None:
        self.path = Path(path)
        self.allow_damage = allow_damage
        self._damage: dict[int, str] = {}
        if not self.path.is_file():
            raise DataError(f"{self.path}: no such file")
        self.size = self.path.stat().st_size
        with self.path.open("rb") as file:
            self._check_start(file.read(4))
            if not allow_damage:
                self._check_end(file)

    @property
    def damage(self) -> list[str]:
        """What was stepped over, by place; the first of it, if there is very much."""
        return [self._damage[at] for at in sorted(self._damage)]

    def iter_records(self, start: int = 0, stop: int | None = None) -> Iterator[Record]:
        """Records whose first part lies in [start, stop), in file order."""
        end = self.size if stop is None else stop
        # A handle of its own for each iteration: forked processes share offsets of open files.
        buffering = max(_SCAN_BYTES, min(end - start, _BUFFER_BYTES))
        with self.path.open("rb", buffering=buffering) as file:
            at = _find_head(file, start, self.size)
            while at < min(end, self.size):
                try:
                    payload, following = _read_record(file, at, self.size)
                except _DamagedRecord as error:
                    at = self._step_over(file, at, str(error))
                    continue
                yield Record(at, payload)
                at = following

    def iter_images(self, start: int = 0, stop: int | None = None) -> Iterator[ImageRecord]:
        """The same with the image header taken apart."""
        for offset, payload in self.iter_records(start, stop):
            try:
                yield parse_image(offset, payload)
            except _DamagedRecord as error:
                self._note(offset, str(error))

    def _step_over(self, file: BinaryIO, at: int, why: str) -> int:
        self._note(at, why)
        return _find_head(file, at + 4, self.size)

    def _note(self, at: int, why: str) -> None:
        text = f"{self.path}: the record at byte {at}: {why}"
        if not self.allow_damage:
            raise DataError(f"{text}; copy the file again, or pack what is whole: --allow-damage")
        if len(self._damage) < _LISTED:
            self._damage[at] = text

    def _check_start(self, head: bytes) -> None:
        if head == _MAGIC_BYTES:
            return
        if head == struct.pack("<I", _OLD_MAGIC):
            raise DataError(
                f"{self.path}: RecordIO of 2015 (its magic is {_OLD_MAGIC:#x}, today's {MAGIC:#x}):"
                " write it anew with im2rec of a later MXNet"
            )
        raise DataError(
            f"{self.path}: no RecordIO file: it starts with {head!r}, not {_MAGIC_BYTES!r}"
            if head
            else f"{self.path}: the file is empty"
        )

    def _check_end(self, file: BinaryIO) -> None:
        """The last record must reach to the end of the file: a cut is told before any work."""
        reach = min(self.size, _SCAN_BYTES)
        while True:
            heads = _heads(file, (self.size - reach) // 4 * 4, self.size)
            if heads or reach == self.size:
                break
            reach = min(self.size, 4 * reach)
        at = heads[-1] if heads else 0
        try:
            while at < self.size:
                at = _read_record(file, at, self.size)[1]
        except _DamagedRecord as error:
            raise DataError(
                f"{self.path}: cut at its end, byte {self.size}: the record at byte {at}: {error}; "
                "copy the file again, or pack what is whole: --allow-damage"
            ) from None


class _DamagedRecord(ValueError):  # noqa: N818 - a finding about the data
    """What is wrong with a record."""


def parse_image(offset: int, payload: bytes) -> ImageRecord:
    """Labels, id and image of a record's payload."""
    if len(payload) < _HEADER.size:
        raise _DamagedRecord(f"{len(payload)} bytes hold no image header")
    flag, label, number, _ = _HEADER.unpack_from(payload)
    body = _HEADER.size + 4 * flag
    if flag > _MAX_LABELS or body > len(payload):
        raise _DamagedRecord(f"an image header that tells of {flag} labels: no image record?")
    labels = struct.unpack_from(f"<{flag}f", payload, _HEADER.size) if flag else (label,)
    return ImageRecord(offset, labels, number, flag, payload[body:])


def read_property(path: Path) -> int:
    """num_classes of the `property` file beside a .rec, 0 when there is none.

    Its one line is num_classes,height,width. Raises DataError for anything else.
    """
    if not path.is_file():
        return 0
    text = path.read_text(errors="replace").strip()
    fields = text.split(",")
    if len(fields) != 3 or not all(field.strip().isdigit() for field in fields):
        raise DataError(f"{path}: {text[:60]!r} is not num_classes,height,width")
    return int(fields[0])


def class_of(record: ImageRecord, origin: str) -> int:
    """The first label as an integer; DataError where it is none."""
    label = record.labels[0] if record.labels else math.nan
    if not math.isfinite(label) or label != int(label) or label < 0:
        raise DataError(
            f"{origin}: the record at byte {record.offset} has the label {label:g}, which is no "
            "class number from 0 on"
        )
    return int(label)


def _read_record(file: BinaryIO, at: int, size: int) -> tuple[bytes, int]:
    """The payload of the record at `at`, and where the next one starts."""
    file.seek(at)
    parts: list[bytes] = []
    while True:
        head = file.read(_PART.size)
        if len(head) < _PART.size:
            raise _DamagedRecord(f"the file ends inside a part's head, at byte {size}")
        magic, word = _PART.unpack(head)
        kind, length = word >> _LENGTH_BITS, word & ((1 << _LENGTH_BITS) - 1)
        if magic != MAGIC or kind > _LAST:
            raise _DamagedRecord(f"no part starts at byte {at}: {head!r}")
        if (kind in (_MIDDLE, _LAST)) != bool(parts):
            raise _DamagedRecord(f"a part of kind {kind} at byte {at} where {len(parts)} came")
        padded = -(-length // 4) * 4
        payload = file.read(padded)
        if len(payload) < padded:
            raise _DamagedRecord(f"the part at byte {at} wants {padded} bytes, the file ends")
        at += _PART.size + padded
        parts.append(payload[:length])
        if kind in (_WHOLE, _LAST):
            return _MAGIC_BYTES.join(parts), at


def _find_head(file: BinaryIO, start: int, size: int) -> int:
    """The first part at `start` or later that begins a record, else `size`."""
    at = -(-start // 4) * 4
    while at < size:
        stop = min(at + _SCAN_BYTES, size)
        heads = _heads(file, at, stop)
        if heads:
            return heads[0]
        at = stop // 4 * 4 if stop < size else size
    return size


def _heads(file: BinaryIO, start: int, stop: int) -> list[int]:
    """Offsets in [start, stop) of parts that begin a record; `start` is a multiple of 4."""
    data = os.pread(file.fileno(), stop - start + 4, start)
    words = np.frombuffer(data[: len(data) // 4 * 4], "<u4")
    found = np.flatnonzero(words[:-1] == MAGIC)
    kinds = words[found + 1] >> _LENGTH_BITS
    return [start + 4 * int(place) for place in found[kinds <= _FIRST] if 4 * place < stop - start]
