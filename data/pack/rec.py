"""A .rec file of faces -> shards, in file order or shuffled through a pool of fixed size.

Memory: `pool_bytes` of records where the order is shuffled (one record in file order), the index of
the shard that is being written (about 300 bytes a sample of it) and one byte a class. Nothing grows
with the number of records: 40 million need what 4 million need.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data.errors import DataError
from data.order import derive_key, permute
from data.pack.images import image_part
from data.pack.limits import LIMITS, ShardLimits
from data.pack.numbering import NAMING, LabelNumbering, Naming
from data.pack.recordio import ImageRecord, RecordFile, class_of, read_property
from data.pack.writer import LeftOut, Packed, Progress, pack_iterable

POOL_BYTES = 256 << 20
EXACT_LABELS = 1 << 24
"""float32 holds every integer up to here, and not those after it."""

_POOL_BLOCKS = 64  # places of the file that are mixed with each other
_BLOCKS, _POOL = 1, 2  # what a key is for
_SCAN_BYTES = 1 << 20
_MEASURED = 256  # records whose mean size tells how many there are


class Ranges(NamedTuple):
    """Identity records: identity j has the images with keys in [starts[j], stops[j])."""

    starts: NDArray[np.int64]
    stops: NDArray[np.int64]

    def identity_of(self, key: int) -> int:
        """The identity of an image, -1 where it lies in none."""
        place = int(np.searchsorted(self.starts, key, side="right")) - 1
        return place if place >= 0 and key < self.stops[place] else -1


def pack_rec(
    rec: str | Path,
    out: str | Path,
    *,
    order: Literal["shuffled", "file"] = "shuffled",
    seed: int = 0,
    pool_bytes: int = POOL_BYTES,
    naming: Naming = NAMING,
    allow_damage: bool = False,
    limits: ShardLimits = LIMITS,
    progress: Progress | None = None,
) -> Packed:
    """Write every image record; its class is the first label, its key the record's byte offset.

    Classes are the labels as they are, after those of earlier packs (`data/pack/numbering.py`).
    `order="shuffled"` mixes 64 places of the file at a time, as far as `pool_bytes` reach. Labels
    above 2^24 are not exact: the identity records tell them apart, where they are. Of an array of
    labels the first counts. Raises DataError for a damaged file, labels that are no class numbers,
    and when nothing is left.
    """
    file = RecordFile(rec, allow_damage=allow_damage)
    numbering = LabelNumbering(file.path.resolve().parent, out, naming)
    images = _shuffled(file, seed, pool_bytes) if order == "shuffled" else file.iter_images()
    left_out = LeftOut()
    packed = pack_iterable(
        _iter_samples(images, _Classes(file), numbering, left_out),
        out,
        max_samples=limits.max_samples,
        max_bytes=limits.max_bytes,
        total=_estimate(file),
        progress=progress,
    )
    numbering.save()
    for line in file.damage:
        left_out.add(line)
    return replace(packed, left_out=left_out.told(), num_identities=numbering.num_identities)


class _Classes:
    """The class of a record: its label, or by identity records where labels are not exact."""

    def __init__(self, file: RecordFile) -> None:
        self._origin = str(file.path)
        self._num_classes = read_property(file.path.with_name("property"))
        self._why_not = "there is no .idx beside it to find identity ranges with"
        self._ranges: Ranges | None = None
        index = file.path.with_suffix(".idx")
        if index.is_file():
            self._find_ranges(file, index)

    def of(self, record: ImageRecord) -> int:
        """The class number. Raises DataError where it is not certain or out of range."""
        if self._ranges is not None:
            identity = self._ranges.identity_of(record.id)
            if identity < 0:
                raise self._error(record, f"the image {record.id} lies in no identity's range")
            return identity
        label = class_of(record, self._origin)
        if label >= EXACT_LABELS:
            raise self._error(
                record,
                f"the label {label:,} is a float32, which tells integers apart up to 2^24 = "
                f"{EXACT_LABELS:,} only, and {self._why_not}: pack from the list instead (nsphere "
                "pack lst)",
            )
        if self._num_classes and label >= self._num_classes:
            raise self._error(
                record,
                f"the label {label} and the property file's {self._num_classes} classes do not fit",
            )
        return label

    def _find_ranges(self, file: RecordFile, index: Path) -> None:
        """Take the ranges if the layout has them, labels need them and they are exact."""
        keys = identity_keys(file, index)
        if keys is None:
            self._why_not = "it has no identity records"
            return
        # Labels rise from identity to identity: the last one's tell whether any is too large.
        last = record_of(file, index, keys[1] - 1)
        image = record_of(file, index, int(last.labels[0])) if last else None
        if image is None or class_of(image, self._origin) < EXACT_LABELS:
            self._why_not = "the last identity's label is smaller, so identities are not in order"
            return
        found = read_ranges(file, index, keys)
        if found.stops.max() >= EXACT_LABELS:
            self._why_not = "its identity ranges are float32 above 2^24 too"
        else:
            self._ranges = found

    def _error(self, record: ImageRecord, text: str) -> DataError:
        return DataError(f"{self._origin}: the record at byte {record.offset}: {text}")


def identity_keys(file: RecordFile, index: Path) -> tuple[int, int] | None:
    """First key of the identity records and the one after the last, by insightface's key 0.

    None for im2rec's layout, where key 0 is an image.
    """
    header = record_of(file, index, 0)
    if header is None or header.image or len(header.labels) != 2:
        return None
    first, last = (int(label) for label in header.labels)
    return (first, last) if first < last else None


def read_ranges(file: RecordFile, index: Path, keys: tuple[int, int]) -> Ranges:
    """The keys of each identity's images. Raises DataError where identity records are missing."""
    start = find_offset(index, keys[0])
    pairs: list[tuple[float, ...]] = []
    for record in file.iter_images(start if start is not None else file.size):
        if len(pairs) == keys[1] - keys[0]:
            break
        if not record.image and len(record.labels) == 2:
            pairs.append(record.labels)
    if len(pairs) < keys[1] - keys[0]:
        raise DataError(
            f"{file.path}: key 0 tells of identity records {keys[0]} to {keys[1] - 1}, and "
            f"{len(pairs)} are there"
        )
    table = np.array(pairs, np.int64)
    return Ranges(table[:, 0].copy(), table[:, 1].copy())


def find_offset(index: Path, key: int) -> int | None:
    """Byte offset of a key by the lines "key<TAB>offset" of an .idx, read in pieces."""
    wanted, rest = b"\n%d\t" % key, b"\n"
    with index.open("rb") as file:
        while piece := file.read(_SCAN_BYTES):
            text = rest + piece
            at = text.find(wanted)
            if at >= 0:
                line = (text[at + len(wanted) :] + file.read(64)).split(b"\n", 1)[0]
                return int(line) if line.strip().isdigit() else None
            rest = text[-64:]
    return None


def record_of(file: RecordFile, index: Path, key: int) -> ImageRecord | None:
    """The record of a key, None where the .idx has no such key."""
    offset = find_offset(index, key)
    if offset is None or (offset >= file.size and file.allow_damage):
        return None
    record = next(file.iter_images(offset, offset + 4), None)
    if record is None and not file.allow_damage:
        raise DataError(
            f"{index}: key {key} lies at byte {offset}, where {file.path} has no record: the index "
            "is another file's; delete it or take the right one"
        )
    return record


def _iter_samples(
    images: Iterator[ImageRecord],
    classes: _Classes,
    numbering: LabelNumbering,
    left_out: LeftOut,
) -> Iterator[tuple[str, dict[str, Any]]]:
    for record in images:
        if not record.image and record.flag == 2:
            continue  # insightface's header and identity records
        try:
            parts: dict[str, Any] = dict(image_part(record.image))
        except DataError as error:
            left_out.add(f"the record at byte {record.offset}: {error}")
            continue
        origin = f"the record at byte {record.offset}"
        parts["cls"] = numbering.number(classes.of(record), origin)
        yield f"{record.offset:012d}", parts


def _shuffled(file: RecordFile, seed: int, pool_bytes: int) -> Iterator[ImageRecord]:
    """Records of blocks in a keyed order; the blocks of a pool are permuted record by record."""
    block = max(1, pool_bytes // _POOL_BLOCKS)
    num_blocks = np.array([-(-file.size // block)])
    for first in range(0, int(num_blocks[0]), _POOL_BLOCKS):
        places = np.arange(first, min(first + _POOL_BLOCKS, int(num_blocks[0])))
        blocks = permute(places, num_blocks, derive_key(seed, _BLOCKS))
        yield from _permuted(
            [
                record
                for number in blocks.tolist()
                for record in file.iter_images(number * block, (number + 1) * block)
            ],
            derive_key(seed, _POOL, first),
        )


def _permuted(pool: Sequence[ImageRecord], key: NDArray[np.uint64]) -> Iterator[ImageRecord]:
    places = np.arange(len(pool))
    for place in permute(places, np.array([max(1, len(pool))]), key).tolist():
        yield pool[place]


def _estimate(file: RecordFile) -> int:
    """About how many records there are, by the mean size of the first ones; for the progress."""
    heads = [record.offset for record in islice(file.iter_records(), _MEASURED)]
    return round(file.size * (len(heads) - 1) / heads[-1]) if len(heads) > 1 else 0
