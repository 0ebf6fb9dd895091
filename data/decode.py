"""Image bytes -> uint8 RGB arrays, and the size of an image from its first bytes.

JPEG goes to simplejpeg (libjpeg-turbo without Pillow's copies: 1.35 times as fast), plain WebP to
torchvision (1.15 times), everything else to Pillow; PNG too, since torchvision's decoder crashes
the process on damaged files. The pixels are Pillow's on every path.
"""

import io
import struct
import warnings
from collections.abc import Iterator

import numpy as np
import simplejpeg
import torch
import torchvision.io
from PIL import Image, ImageOps

MAX_PIXELS = 25_000_000
_JPEG = b"\xff\xd8"
_PNG = b"\x89PNG\r\n\x1a\n"
_SOF_MARKERS = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_DAMAGED = ("bad Huffman code", "premature end of data segment")
_ORIENTATION = 0x0112


class BadSample(ValueError):  # noqa: N818 - a finding about the data, not a fault of the program
    """This sample cannot be used; the text is the reason, for the log."""


def decode_image(
    data: bytes | memoryview, max_pixels: int = MAX_PIXELS
) -> np.ndarray:  # (h, w, 3) uint8
    """Pixels of an encoded image as RGB, turned as its EXIF says, transparency laid on white.

    Raises BadSample for bytes that are no image, are cut short or damaged, or hold more than
    `max_pixels`; the cap is read from the header, before anything is decoded.
    """
    data = bytes(data)
    pixels = None
    if data[:2] == _JPEG:
        pixels = _decode_jpeg(data, max_pixels)
    else:
        _check_pixels(*image_size(data), max_pixels)
        if data[8:16] == b"WEBPVP8 ":  # WebP's other forms may hold transparency and EXIF
            pixels = _decode_webp(data)
    return _decode_any(data, max_pixels) if pixels is None else pixels


def image_size(data: bytes | memoryview) -> tuple[int, int]:
    """Width and height as stored, from the first bytes of an image; (0, 0) when they do not tell.

    Reads JPEG, PNG, WebP, GIF and BMP headers; never raises. A JPEG's size may stand behind a
    long EXIF or ICC block, so give it the first 64 KiB where that is cheap.
    """
    head = bytes(data[:32])
    try:
        if head[:2] == _JPEG:
            return _jpeg_size(data)
        if head[:8] == _PNG:
            width, height = struct.unpack(">II", head[16:24])
            return width, height
        if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
            return _webp_size(head)
        if head[:4] == b"GIF8":
            width, height = struct.unpack("<HH", head[6:10])
            return width, height
        if head[:2] == b"BM":
            width, height = struct.unpack("<ii", head[18:26])
            return abs(width), abs(height)
    except (IndexError, struct.error):
        pass
    return 0, 0


def _jpeg_size(data: bytes | memoryview) -> tuple[int, int]:
    for marker, at in _jpeg_segments(data):
        if marker in _SOF_MARKERS:
            return data[at + 5] << 8 | data[at + 6], data[at + 3] << 8 | data[at + 4]
    return 0, 0


def _jpeg_segments(data: bytes | memoryview) -> Iterator[tuple[int, int]]:
    """Marker and payload offset (at its length field) of each segment before the coded pixels."""
    at = 2
    while True:
        while data[at] != 0xFF:  # garbage between segments is legal to skip
            at += 1
        while data[at] == 0xFF:  # fill bytes
            at += 1
        marker = data[at]
        at += 1
        if marker in (0xD9, 0xDA):
            return
        if marker != 0x01 and not 0xD0 <= marker <= 0xD8:
            yield marker, at
            at += data[at] << 8 | data[at + 1]


def _webp_size(head: bytes) -> tuple[int, int]:
    form = head[12:16] if len(head) >= 30 else b""
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


def _decode_jpeg(data: bytes, max_pixels: int) -> np.ndarray | None:
    width, height, channels, has_app1 = _jpeg_header(data)
    _check_pixels(width, height, max_pixels)
    if channels not in (1, 3):
        return None  # CMYK and YCCK: libjpeg-turbo rounds them otherwise than Pillow
    # libjpeg-turbo writes rows that start on 32 bytes past the cache, and the next step would
    # wait for memory: from an odd address it does not. A 112x112 face takes 57 us, else 86.
    buffer = np.empty(width * height * 3 + 1, np.uint8)[1:]
    try:
        pixels = simplejpeg.decode_jpeg(data, "RGB", buffer=buffer)
    except ValueError as error:
        if any(damage in str(error) for damage in _DAMAGED):  # Pillow would deliver the garbage
            raise BadSample(f"damaged image: {error}") from None
        return None  # 12 bit, harmless warnings, cut short: Pillow decides
    return _turn(pixels, _orientation(data)) if has_app1 else pixels


def _jpeg_header(data: bytes) -> tuple[int, int, int, bool]:
    """Width, height, channels, and whether there is a segment that may hold an orientation."""
    width = height = channels = 0
    has_app1 = False
    try:
        for marker, at in _jpeg_segments(data):
            if marker in _SOF_MARKERS:
                height, width = data[at + 3] << 8 | data[at + 4], data[at + 5] << 8 | data[at + 6]
                channels = data[at + 7]
            elif marker == 0xE1:
                has_app1 = True
    except IndexError:
        return 0, 0, 0, False
    return width, height, channels, has_app1


def _orientation(data: bytes) -> int:
    # EXIF or XMP: Pillow's reading of either is the one to equal, at 40 us.
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return int(Image.open(io.BytesIO(data)).getexif().get(_ORIENTATION, 1))
    except Exception:  # noqa: BLE001 - broken EXIF raises whatever it likes, and says nothing
        return 1


def _turn(pixels: np.ndarray, orientation: int) -> np.ndarray:
    if orientation <= 1 or orientation > 8:
        return pixels
    if orientation >= 5:
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)


def _decode_webp(data: bytes) -> np.ndarray | None:
    try:
        encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        return torchvision.io.decode_webp(encoded).permute(1, 2, 0).numpy()  # (h, w, 3)
    except RuntimeError:
        return None


def _decode_any(data: bytes, max_pixels: int) -> np.ndarray:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Pillow, about odd files that it can read
            image = Image.open(io.BytesIO(data))
            _check_pixels(*image.size, max_pixels)
            return _as_rgb(ImageOps.exif_transpose(image))
    except BadSample:
        raise
    except Exception as error:  # noqa: BLE001 - decoders fed garbage raise whatever they like
        raise BadSample(f"not a readable image: {error}") from None


def _as_rgb(image: Image.Image) -> np.ndarray:
    if image.mode.startswith("I"):  # 16 bit grey: its high byte, where convert() would clip
        grey = (np.asarray(image).clip(0, 65535).astype(np.uint16) >> 8).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return np.array(image.convert("RGB"))


def _check_pixels(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise BadSample(f"{width}x{height} is more than data.max_pixels = {max_pixels}")
