"""Image bytes -> uint8 RGB arrays, and the size of an image from its first bytes."""

import struct

_SOF_MARKERS = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}


class BadSample(ValueError):
    """This sample cannot be used; the text is the reason, for the log."""


def image_size(data: bytes | memoryview) -> tuple[int, int]:
    """Width and height as stored, from the first bytes of an image; (0, 0) when they do not tell.

    Reads JPEG, PNG, WebP, GIF and BMP headers; never raises. A JPEG's size may stand behind a
    long EXIF or ICC block, so give it the first 64 KiB where that is cheap.
    """
    head = bytes(data[:32])
    try:
        if head[:2] == b"\xff\xd8":
            return _jpeg_size(data)
        if head[:8] == b"\x89PNG\r\n\x1a\n":
            width, height = struct.unpack(">II", head[16:24])
            return width, height
        if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
            return _webp_size(head)
        if head[:4] == b"GIF8":
            width, height = struct.unpack("<HH", head[6:10])
            return width, height
        if head[:2] == b"BM":
            width, height = struct.unpack("<ii", head[18:26])
            return width, abs(height)
    except (IndexError, struct.error):
        pass
    return 0, 0


def _jpeg_size(data: bytes | memoryview) -> tuple[int, int]:
    at = 2
    while True:
        while data[at] != 0xFF:  # garbage between segments is legal to skip
            at += 1
        while data[at] == 0xFF:  # fill bytes
            at += 1
        marker = data[at]
        if marker in _SOF_MARKERS:
            return data[at + 6] << 8 | data[at + 7], data[at + 4] << 8 | data[at + 5]
        if marker in (0xD9, 0xDA):
            return 0, 0
        has_length = not (marker == 0x01 or 0xD0 <= marker <= 0xD8)
        at += 1 + (data[at + 1] << 8 | data[at + 2]) * has_length


def _webp_size(head: bytes) -> tuple[int, int]:
    form = head[12:16]
    if form == b"VP8X":
        width = int.from_bytes(head[24:27], "little") + 1
        return width, int.from_bytes(head[27:30], "little") + 1
    if form == b"VP8L" and head[20] == 0x2F:
        bits = int.from_bytes(head[21:25], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if form == b"VP8 " and head[23:26] == b"\x9d\x01\x2a":
        width, height = struct.unpack("<HH", head[26:30])
        return width & 0x3FFF, height & 0x3FFF
    return 0, 0
