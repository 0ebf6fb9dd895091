"""Tar headers -> members and faults: ustar, PAX, GNU and v7, over anything that reads byte ranges.

Only headers are read; payloads are stepped over. Nothing is believed without its checksum, and
nothing is lost without a `Fault`: the standard library's `tarfile` ends silently at a damaged
header, which costs the rest of the shard. Formats: POSIX.1-2017 pax, GNU tar manual, "Basic Tar
Format" and its extensions.
"""

import gzip
import io
import zlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

BLOCK = 512
MAX_EXTENDED_BYTES = 1 << 20  # PAX records or a GNU long name; real ones have hundreds of bytes
DAMAGE = frozenset({"truncated", "bad_header", "data_after_end", "compression"})
"""Kinds of fault after which members may be missing."""

_ZEROS = bytes(BLOCK)
_REGULAR = "07\0"
_WITHOUT_PAYLOAD = "123456"  # links, devices, folders: their size field means nothing
_EXTENDED = "xgLK"
_SILENT = "3456VDN"  # devices, folders, GNU volume labels and dump listings
_LINKS = {"1": "a hard link", "2": "a symbolic link", "S": "a sparse file", "M": "a continuation"}


class Member(NamedTuple):
    """A regular file of the archive; `offset` is that of its payload."""

    name: str
    offset: int
    size: int


class Fault(NamedTuple):
    """Something wrong; `name` is the member that it costs, if that is known."""

    kind: str
    offset: int
    detail: str
    name: str = ""


class Header(NamedTuple):
    """One header block whose checksum is right."""

    name: str
    size: int
    flag: str
    doubtful: bool
    """The name or size could be a stand-in for that of an extended header."""


class HeaderError(ValueError):
    """A block is not a tar header; the text says why."""


class Window:
    """The bytes round the place that is being read: short steps forward cost no read."""

    def __init__(
        self,
        read_at: Callable[[int, int], bytes],  # (offset, size) -> bytes, short only at the end
        end: Callable[[], int],  # size of the source, -1 as long as it is unknown
        window_bytes: int = 4096,
    ) -> None:
        self._read_at, self.end, self._window_bytes = read_at, end, window_bytes
        self._start, self._bytes = 0, b""

    def at(self, offset: int, size: int) -> bytes:
        """`size` bytes from `offset`, fewer at the end of the source."""
        skip = offset - self._start
        if skip < 0 or skip + size > len(self._bytes):
            self._bytes = bytes(self._read_at(offset, max(size, self._window_bytes)))
            self._start, skip = offset, 0
        return self._bytes[skip : skip + size]


class ForwardReads:
    """`read_at` over a stream that cannot seek: offsets may only grow from the last one read."""

    def __init__(self, stream: io.BufferedIOBase) -> None:
        self._stream, self._start, self._bytes = stream, 0, b""
        self._end = -1
        self.failure = ""
        """Why the stream ended before its time (a broken gzip, a failed command), if it did."""
        self.garbled = False
        """The checksum or coding of a gzip is wrong: any byte that was read may be."""

    def end(self) -> int:
        """Size of the whole stream, -1 until its end was seen."""
        return self._end

    def read_at(self, offset: int, size: int) -> bytes:
        """Bytes from `offset`; what lies before is forgotten. Raises ValueError going back."""
        if offset < self._start:
            raise ValueError(f"a stream cannot go back from {self._start} to {offset}")
        while self._end < 0 and self._start + len(self._bytes) < offset:
            self._start += len(self._bytes)
            self._bytes = self._read(min(offset - self._start, io.DEFAULT_BUFFER_SIZE * 16))
        self._bytes, self._start = self._bytes[offset - self._start :], offset
        while self._end < 0 and len(self._bytes) < size:
            self._bytes += self._read(size - len(self._bytes))
        return self._bytes[:size]

    def _read(self, size: int) -> bytes:
        try:
            piece = self._stream.read1(size)  # read() would lose what came before a failure
        except (OSError, EOFError, zlib.error) as error:
            piece, self.failure = b"", str(error) or type(error).__name__
            self.garbled = isinstance(error, zlib.error | gzip.BadGzipFile)
        if not piece:
            self._end = self._start + len(self._bytes)
        return piece


def iter_members(window: Window) -> Iterator[Member | Fault]:
    """Regular members in archive order, and every fault where it was met.

    A member that the end of the source cuts is followed by the `truncated` fault that names it.
    After a bad header the next good one is looked for block by block.
    """
    walk = _Walk(window)
    while len(block := window.at(walk.offset, BLOCK)) == BLOCK:
        if block == _ZEROS:
            walk.zeros += 1
            walk.offset += BLOCK
            continue
        try:
            header = parse_header(block)
            yield from walk.take(header)
        except HeaderError as bad:
            yield from walk.lose(str(bad))
    yield from walk.finish(block)


class _Walk:
    """Where the walk stands: what the extended headers said, what was met last."""

    def __init__(self, window: Window) -> None:
        self.window = window
        self.offset = 0
        self.zeros = 0
        self._lost = self._found = self._renames = False
        self._extended: dict[str, str] = {}
        self._shared: dict[str, str] = {}
        self._last: Member | None = None

    def take(self, header: Header) -> Iterator[Member | Fault]:
        yield from self._leave_zeros()
        self._found = True
        if header.flag in _EXTENDED:
            self._extend(header)
        else:
            yield from self._member(header)

    def lose(self, why: str) -> Iterator[Fault]:
        after_zeros = bool(self.zeros)
        yield from self._leave_zeros()
        if not self._lost and not after_zeros:
            yield Fault("bad_header", self.offset, why if self._found else self._not_a_tar(why))
        self._lost = True
        self._extended = {}
        self.offset += BLOCK

    def finish(self, rest: bytes) -> Iterator[Fault]:
        end, last = self.window.end(), self._last
        if self.offset == 0 and not rest:
            yield Fault("empty", 0, "the file has no bytes")
        elif last and 0 <= end < last.offset + last.size:
            have = max(0, end - last.offset)
            detail = f"cut inside {last.name}: {have} of its {last.size} bytes"
            yield Fault("truncated", last.offset, detail, last.name)
        elif self._lost and not self._found:
            return  # no tar at all, and said so
        elif self.zeros < 2:
            yield Fault("truncated", self.offset, "ends without the two zero blocks of a whole tar")
        elif rest.strip(b"\0"):
            yield Fault("data_after_end", self.offset, "bytes follow the end blocks")

    def _not_a_tar(self, why: str) -> str:
        if self.window.at(0, 2) == b"\x1f\x8b":
            return "not a tar archive but gzip data: give it a name that ends in .tar.gz"
        return f"not a tar archive: {why}"

    def _leave_zeros(self) -> Iterator[Fault]:
        if self.zeros and not self._lost:
            detail = f"{self.zeros} zero blocks, as at the end of a tar, then more data"
            yield Fault("data_after_end", self.offset, detail)
        self.zeros = 0

    def _extend(self, header: Header) -> None:
        if header.size > MAX_EXTENDED_BYTES:
            raise HeaderError(f"an extended header of {header.size} bytes")
        payload = self.window.at(self.offset + BLOCK, header.size)
        if len(payload) == header.size:  # else cut here: the walk ends at the next block
            if header.flag == "g":
                self._shared |= parse_pax(payload)
            elif header.flag == "x":
                self._extended |= parse_pax(payload)
            elif header.flag == "L":
                self._extended["path"] = _text(payload)
        self._step(header.size)

    def _member(self, header: Header) -> Iterator[Member | Fault]:
        facts = {**self._shared, **self._extended} if self._shared else self._extended
        doubtful = self._lost and not self._extended and (header.doubtful or self._renames)
        self._renames |= "path" in self._extended
        self._extended, self._lost = {}, False
        name = facts.get("path") or header.name
        size = _pax_size(facts["size"], header.size) if facts.get("size") else header.size
        offset = self.offset + BLOCK
        flag = "S" if any(key.startswith("GNU.sparse") for key in facts) else header.flag
        if flag == "S":
            self._step_over_sparse_map()
        self._step(0 if header.flag in _WITHOUT_PAYLOAD else size)
        if flag in _REGULAR and not name.endswith("/"):
            if doubtful:
                detail = f"{name} follows the damage, and its long name or size may be lost with it"
                yield Fault("bad_header", offset - BLOCK, detail)
            else:
                self._last = Member(name, offset, size)
                yield self._last
        elif flag not in _SILENT + _REGULAR:
            what = _LINKS.get(flag, f"of the unknown type {flag!r}")
            yield Fault("unsupported", offset - BLOCK, f"{name} is {what}, not a plain file", name)

    def _step(self, payload_bytes: int) -> None:
        self.offset += BLOCK + -(-payload_bytes // BLOCK) * BLOCK

    def _step_over_sparse_map(self) -> None:
        """Old GNU sparse files put further map blocks between the header and the payload."""
        more = self.window.at(self.offset, BLOCK)[482:483] not in (b"", b"\0")
        while more:
            self.offset += BLOCK
            more = self.window.at(self.offset, BLOCK)[504:505] not in (b"", b"\0")


def parse_header(
    block: bytes,  # 512 bytes
) -> Header:
    """Name, size and type of a header block. Raises HeaderError saying what is wrong."""
    stored = _number(block[148:156])
    # adler32's low half is 1 + the sum of the bytes, modulo 65521, at memory speed; the checksum
    # field itself counts as eight spaces (256).
    if (zlib.adler32(block) & 0xFFFF) != (stored + sum(block[148:156]) - 255) % 65521:
        _check_signed_sum(block, stored)
    size = _number(block[124:136])
    raw = block[:100]
    name = _text(raw)
    if block[257:263] == b"ustar\0" and block[345]:
        name = f"{_text(block[345:500])}/{name}"
    doubtful = size == 0 or raw[99] != 0 or b"?" in raw or not raw.isascii()
    return Header(name, size, chr(block[156]), doubtful)


def parse_pax(payload: bytes) -> dict[str, str]:
    """Records "length key=value\\n" of a PAX header. Raises HeaderError if one is damaged."""
    records = {}
    at = 0
    while at < len(payload) and payload[at]:
        digits, space, _ = payload[at : at + 20].partition(b" ")
        length = int(digits) if digits.isdigit() else 0
        record = payload[at : at + length]
        key, equals, value = record[len(digits) + 1 : -1].partition(b"=")
        if not space or not equals or len(record) != length or record[-1:] != b"\n":
            raise HeaderError(f"a PAX record that does not parse: {payload[at : at + 40]!r}")
        records[_text(key)] = _text(value)
        at += length
    return records


def split_name(name: str) -> tuple[str, str] | None:
    """WebDataset's rule: `dir/key.ending`, the key up to the first dot of the last part.

    None for what has no key or ending and for WebDataset's own `__meta__` members.
    """
    folder, slash, base = name.rpartition("/")
    stem, _, ending = base.partition(".")
    if not stem or not ending or (name.startswith("__") and _is_meta(name)):
        return None
    return folder + slash + stem, ending.lower()


def _is_meta(name: str) -> bool:
    first = name.partition("/")[0]
    return len(first) >= 4 and first.endswith("__")


def _number(field: bytes) -> int:
    """A numeric field: octal digits, or base-256 where the first bit is set (GNU, star)."""
    if field[0] & 0x80:
        value = int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
    else:
        digits = field.partition(b"\0")[0].strip()
        if digits and not digits.isdigit():
            raise HeaderError(f"a number field holds {bytes(field)!r}")
        try:
            value = int(digits or b"0", 8)
        except ValueError:
            raise HeaderError(f"a number field holds {bytes(field)!r}") from None
    if value >= 1 << 60:
        raise HeaderError(f"a number field says {value}")
    return value


def _check_signed_sum(block: bytes, stored: int) -> None:
    """Old Sun and NeXT tars add the bytes up as signed ones."""
    spaced = block[:148] + b" " * 8 + block[156:]
    if sum(byte - 256 if byte > 127 else byte for byte in spaced) != stored:
        raise HeaderError(f"header checksum {sum(spaced)}, stored {stored}")


def _pax_size(text: str, header_size: int) -> int:
    """PAX overrides the header's size; where both are told and differ, one is damaged."""
    if not text.isdecimal() or int(text) >= 1 << 60:
        raise HeaderError(f"a PAX size of {text!r}")
    size = int(text)
    if header_size and size < 8 << 30 and size != header_size:
        raise HeaderError(f"PAX says {size} bytes, the header {header_size}")
    return size


def _text(field: bytes) -> str:
    """Up to the first NUL; bytes that are not UTF-8 are written out, so names stay distinct."""
    return field.partition(b"\0")[0].decode("utf-8", "backslashreplace")
