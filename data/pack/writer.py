"""Samples -> tar shards that any WebDataset reader takes, with our index written in the same pass.

Plain ustar headers (a PAX one only for names that do not fit), time 0, owner 0, mode 0644: equal
samples give equal bytes. A shard appears under its name when it is whole, and never before.
"""

import json
import os
import tarfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

from data.errors import DataError
from data.pack.limits import MAX_BYTES, MAX_SAMPLES
from data.remote import FileStore
from data.rows import DEFAULT_KEYS, Keys, RowBuilder
from data.table import Source, save_table
from data.tar import BLOCK, Member, split_name

Parts = Mapping[str, Any]
"""Ending -> payload: bytes as they are, text as UTF-8, an int in digits, anything else as JSON."""
Progress = Callable[[int, int], None]
"""Called with (samples done, samples in all; 0 when unknown)."""

_PROGRESS_EVERY = 100
_LISTED = 1000


@dataclass(frozen=True)
class Packed:
    """What was written, and what was not."""

    shards: tuple[str, ...]
    num_samples: int
    left_out: tuple[str, ...] = ()
    """One line for each input that gave no sample, with the reason."""
    num_identities: int = 0
    """Identities of these samples, 0 where they have none."""


class LeftOut:
    """Inputs that gave no sample: the first are told one by one, the rest is counted."""

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._num_more = 0

    def add(self, line: str) -> None:
        """One input and its reason."""
        if len(self._lines) < _LISTED:
            self._lines.append(line)
        else:
            self._num_more += 1

    def told(self) -> tuple[str, ...]:
        """All lines, the last one with the count."""
        more = (f"and {self._num_more:,} more",) if self._num_more else ()
        return (*self._lines, *more)


class ShardWriter:
    """Writes `pattern % 0`, `pattern % 1`, ...; use it in a `with` block, which ends the last one.

    `pattern` holds one `%d` field ("out/train-%06d.tar"). A shard ends before the sample that
    would exceed `max_samples` or `max_bytes`. Leaving the block by an exception drops the shard
    that is not whole. Raises DataError when a shard already exists.
    """

    def __init__(
        self,
        pattern: str | Path,
        *,
        max_samples: int = MAX_SAMPLES,
        max_bytes: int = MAX_BYTES,
        keys: Keys = DEFAULT_KEYS,
    ) -> None:
        self._pattern = _check_pattern(str(pattern))
        self._max_samples, self._max_bytes, self._keys = max_samples, max_bytes, keys
        self._shard: _OpenShard | None = None
        self.shards: list[str] = []
        """Paths of the shards that are whole."""
        self.num_samples = 0

    def write(self, key: str, parts: Parts) -> None:
        """Add a sample; members are sorted by ending, images last.

        Raises DataError for a key or ending that a reader would split elsewhere, and for a key
        that the shard already has.
        """
        members = _members(key, parts, self._keys)
        size = sum(len(header) + len(payload) for _, header, payload in members)
        shard = self._shard
        if shard and shard.num_samples and not shard.fits(size, self._max_samples, self._max_bytes):
            self._finish()
        if self._shard is None:
            self._shard = _OpenShard(self._pattern % len(self.shards), self._keys)
        self._shard.write(key, members)
        self.num_samples += 1

    def close(self) -> None:
        """End the last shard."""
        self._finish()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self._finish()
        elif self._shard is not None:
            self._shard.drop()
            self._shard = None

    def _finish(self) -> None:
        shard, self._shard = self._shard, None
        if shard is not None:
            shard.finish()
            self.shards.append(shard.path)


class _OpenShard:
    """The shard that is being written, under a name of its own beside its place."""

    def __init__(self, path: str, keys: Keys) -> None:
        if os.path.exists(path):
            raise DataError(f"{path} exists; delete it or write under another name")
        folder, name = os.path.split(path)
        self.path, self._keys = path, keys
        self._draft = os.path.join(folder, f".{name}.{os.getpid()}.draft")
        try:
            os.makedirs(folder or ".", exist_ok=True)
            self._file: BinaryIO = open(self._draft, "wb")
        except OSError as error:
            raise DataError(f"{path}: cannot be written: {error.strerror}") from None
        self._rows = RowBuilder(keys)
        self._seen: set[str] = set()

    @property
    def num_samples(self) -> int:
        return len(self._seen)

    def fits(self, size: int, max_samples: int, max_bytes: int) -> bool:
        return self.num_samples < max_samples and self._file.tell() + size <= max_bytes

    def write(self, key: str, members: list[tuple[str, bytes, bytes]]) -> None:
        if key in self._seen:
            raise DataError(f"{self.path} already has a sample {key!r}; keys are unique in a shard")
        self._seen.add(key)
        for name, header, payload in members:
            offset = self._file.tell() + len(header)
            self._file.write(header + payload + bytes(-len(payload) % BLOCK))
            self._rows.add(
                Member(name, offset, len(payload)),
                lambda at, size, o=offset, p=payload: p[at - o : at - o + size],  # type: ignore[misc]
            )

    def finish(self) -> None:
        self._file.write(bytes(2 * BLOCK))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self._draft, self.path)
        size_bytes, version = FileStore(self.path).version()
        rows, notes = self._rows.finish()
        source = Source(self.path, size_bytes, version, seekable=True)
        save_table(source, self._keys, rows, notes, self._rows.json_fields)

    def drop(self) -> None:
        self._file.close()
        os.unlink(self._draft)


def pack_iterable(
    samples: Iterable[tuple[str, Parts]],
    out: str | Path,
    *,
    max_samples: int = MAX_SAMPLES,
    max_bytes: int = MAX_BYTES,
    keys: Keys = DEFAULT_KEYS,
    total: int = 0,
    progress: Progress | None = None,
) -> Packed:
    """Write (key, parts) pairs to shards; `out` is a pattern, one file name, or a folder.

    `total` is only told to `progress`. Raises DataError when there is no sample.
    """
    pattern = shard_pattern(out)
    with ShardWriter(pattern, max_samples=max_samples, max_bytes=max_bytes, keys=keys) as writer:
        for key, parts in samples:
            writer.write(key, parts)
            if progress is not None and writer.num_samples % _PROGRESS_EVERY == 0:
                progress(writer.num_samples, total)
    if not writer.num_samples:
        raise DataError(f"nothing to write to {out}: there is no sample")
    if progress is not None:
        progress(writer.num_samples, total or writer.num_samples)
    return Packed(tuple(writer.shards), writer.num_samples)


def shard_pattern(out: str | Path) -> str:
    """ "a/%06d.tar" as it is; "a/x.tar" -> "a/x-%06d.tar"; a folder -> "folder/%06d.tar"."""
    text = str(out)
    if "%" in text:
        return text
    if text.endswith(".tar"):
        return text.removesuffix(".tar") + "-%06d.tar"
    return os.path.join(text, "%06d.tar")


def _check_pattern(pattern: str) -> str:
    try:
        distinct = pattern % 0 != pattern % 1
    except (TypeError, ValueError):
        distinct = False
    if not distinct or not pattern.endswith(".tar"):
        raise DataError(f"{pattern!r} is no shard pattern: write it like out/train-%06d.tar")
    return pattern


def _members(key: str, parts: Parts, keys: Keys) -> list[tuple[str, bytes, bytes]]:
    """(name, header bytes, payload) in the order of the tar."""
    images = keys.image.split(";")
    members = []
    for ending in sorted(parts, key=lambda ending: (ending in images, ending)):
        name = f"{key}.{ending}"
        if split_name(name) != (key, ending) or "\0" in name:
            raise DataError(
                f"{name!r} is no member name: the key takes no dot after its last slash,"
                " endings are lower case, and neither is empty"
            )
        payload = _payload(name, parts[ending])
        members.append((name, _header(name, len(payload)), payload))
    if not members:
        raise DataError(f"sample {key!r} has no parts")
    return members


def _header(name: str, size: int) -> bytes:
    raw = name.encode("utf-8", "surrogateescape")
    if len(raw) > _NAME_BYTES or not raw.isascii() or size > _PLAIN_SIZE:
        return _tarfile_header(name, size)
    # tarfile takes 50 us for what differs in two fields and their sum.
    digits = b"%011o" % size
    checksum = _BLANK_SUM + sum(raw) + sum(digits)
    return b"".join(
        (
            raw.ljust(_NAME_BYTES, b"\0"),
            _BLANK[_NAME_BYTES:124],
            digits,
            _BLANK[135:148],
            b"%06o\0 " % checksum,
            _BLANK[156:],
        )
    )


def _tarfile_header(name: str, size: int) -> bytes:
    info = tarfile.TarInfo(name)
    info.size = size
    return info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")


_NAME_BYTES = 100
_PLAIN_SIZE = 8**11 - 1
_BLANK = _tarfile_header("", 0)
# Without its size, and its checksum counted as blanks.
_BLANK_SUM = sum(_BLANK) - sum(_BLANK[124:135]) - sum(_BLANK[148:156]) + 8 * ord(" ")


def _payload(name: str, value: Any) -> bytes:
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value)
    if isinstance(value, str):
        return value.encode()
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise DataError(f"{name}: neither bytes nor text nor JSON: {error}") from None
