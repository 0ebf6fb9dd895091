"""A writer of MXNet RecordIO for tests, after dmlc-core's format and nothing of ours."""

import struct
from collections.abc import Iterable
from pathlib import Path

MAGIC = struct.pack("<I", 0xCED7230A)


def part(kind: int, payload: bytes) -> bytes:
    return MAGIC + struct.pack("<I", kind << 29 | len(payload)) + payload + bytes(-len(payload) % 4)


def record(payload: bytes) -> bytes:
    """One record, cut where the magic stands at a multiple of 4."""
    places = [at for at in range(0, len(payload) - 3, 4) if payload[at : at + 4] == MAGIC]
    if not places:
        return part(0, payload)
    starts = [0, *(at + 4 for at in places)]
    pieces = [payload[a:b] for a, b in zip(starts, [*places, len(payload)], strict=True)]
    kinds = [1, *[2] * (len(pieces) - 2), 3]
    return b"".join(part(kind, piece) for kind, piece in zip(kinds, pieces, strict=True))


def image(label: float | Iterable[float], number: int, data: bytes) -> bytes:
    """MXNet's image header and the image; several labels make an array of them."""
    if isinstance(label, int | float):
        return struct.pack("<IfQQ", 0, label, number, 0) + data
    labels = tuple(label)
    header = struct.pack("<IfQQ", len(labels), 0.0, number, 0)
    return header + struct.pack(f"<{len(labels)}f", *labels) + data


def write_rec(path: Path, payloads: Iterable[tuple[int, bytes]], index: bool = True) -> Path:
    """Records by key, in this order, and their .idx."""
    lines = []
    with path.open("wb") as file:
        for key, payload in payloads:
            lines.append(f"{key}\t{file.tell()}\n")
            file.write(record(payload))
    if index:
        path.with_suffix(".idx").write_text("".join(lines))
    return path


def face_records(images: list[bytes], labels: list[float], arrays: bool = False):
    """insightface's layout as its script writes it: images, header (key 0), identities."""
    number = len(images)
    keyed = list(range(1, number + 1))
    for key, data, label in zip(keyed, images, labels, strict=True):
        yield key, image([label, 1.0] if arrays else label, key, data)
    starts = [k for k in keyed if k == 1 or labels[k - 1] != labels[k - 2]]
    ends = [*starts[1:], number + 1]
    yield 0, image([number + 1, number + 1 + len(starts)], 0, b"")
    for place, (start, end) in enumerate(zip(starts, ends, strict=True)):
        yield number + 1 + place, image([start, end], number + 1 + place, b"")
