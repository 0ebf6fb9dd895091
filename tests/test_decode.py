"""Decoding against Pillow, on every kind of image and on what is none."""

import io
import itertools
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from data.decode import BadSample, decode_image, image_size

WIDTH, HEIGHT = 61, 43


def picture(mode: str = "RGB", size: tuple[int, int] = (WIDTH, HEIGHT)) -> Image.Image:
    """A smooth picture with a little noise, so that JPEG's chroma paths matter."""
    draw = np.random.default_rng(0)
    small = draw.integers(0, 256, (6, 8, 4), dtype=np.uint8)
    image = Image.fromarray(small, "RGBA").resize(size, Image.Resampling.BICUBIC)
    noisy = np.asarray(image).astype(int) + draw.integers(-6, 7, (size[1], size[0], 4))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8), "RGBA").convert(mode)


def encoded(image: Image.Image, form: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def by_pillow(data: bytes) -> np.ndarray:
    return np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))


def on_white(image: Image.Image) -> np.ndarray:
    pixels = np.asarray(image.convert("RGBA")).astype(float)
    alpha = pixels[:, :, 3:] / 255
    return pixels[:, :, :3] * alpha + 255 * (1 - alpha)


OPAQUE = {
    "jpeg": encoded(picture(), "JPEG", quality=90),
    "jpeg 4:4:4": encoded(picture(), "JPEG", quality=95, subsampling=0),
    "jpeg 4:2:2": encoded(picture(), "JPEG", quality=80, subsampling=1),
    "jpeg progressive": encoded(picture(), "JPEG", progressive=True),
    "jpeg restarts": encoded(picture(), "JPEG", restart_marker_rows=1),
    "jpeg grey": encoded(picture("L"), "JPEG"),
    "jpeg cmyk": encoded(picture("CMYK"), "JPEG"),
    "jpeg rgb": encoded(picture(), "JPEG", keep_rgb=True),
    "jpeg trailing bytes": encoded(picture(), "JPEG") + b"trailing" * 9,
    "png": encoded(picture(), "PNG"),
    "png grey": encoded(picture("L"), "PNG"),
    "png bits": encoded(picture("1"), "PNG"),
    "png palette": encoded(picture().quantize(64), "PNG"),
    "webp": encoded(picture(), "WEBP", quality=80),
    "webp lossless": encoded(picture(), "WEBP", lossless=True),
    "gif": encoded(picture().quantize(64), "GIF"),
    "bmp": encoded(picture(), "BMP"),
    "tiff": encoded(picture(), "TIFF"),
    "tiff cmyk": encoded(picture("CMYK"), "TIFF"),
    "ppm": encoded(picture(), "PPM"),
}


@pytest.mark.parametrize("kind", OPAQUE)
def test_pixels_are_pillows(kind):
    data = OPAQUE[kind]
    pixels = decode_image(memoryview(data))
    assert pixels.dtype == np.uint8 and pixels.shape == (HEIGHT, WIDTH, 3)
    assert pixels.flags.c_contiguous and pixels.flags.writeable
    np.testing.assert_array_equal(pixels, by_pillow(data))


@pytest.mark.parametrize("size", [(1, 1), (1, 17), (16, 16), (33, 15), (640, 481)])
def test_jpegs_of_any_size_are_pillows(size):
    for subsampling in (0, 1, 2):
        data = encoded(picture(size=size), "JPEG", quality=85, subsampling=subsampling)
        np.testing.assert_array_equal(decode_image(data), by_pillow(data))


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_turns_as_pillow_turns(form, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(picture(), form, exif=exif)
    np.testing.assert_array_equal(decode_image(data), by_pillow(data))
    turned = 5 <= orientation <= 8
    assert decode_image(data).shape == ((WIDTH, HEIGHT, 3) if turned else (HEIGHT, WIDTH, 3))


def test_an_orientation_in_xmp_and_broken_exif_are_read_as_pillow_reads_them():
    xmp = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    data = encoded(picture(), "JPEG", xmp=xmp)
    assert by_pillow(data).shape == (WIDTH, HEIGHT, 3)
    np.testing.assert_array_equal(decode_image(data), by_pillow(data))
    body = b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12"
    broken = data[:2] + b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body + OPAQUE["jpeg"][2:]
    assert decode_image(broken).shape == (HEIGHT, WIDTH, 3)


@pytest.mark.parametrize(
    ("mode", "form", "options"),
    [
        ("RGBA", "PNG", {}),
        ("LA", "PNG", {}),
        ("RGBA", "WEBP", {"lossless": True, "exact": True}),
        ("RGBA", "TIFF", {}),
    ],
)
def test_transparency_lies_on_white(mode, form, options):
    image = picture(mode)
    pixels = decode_image(encoded(image, form, **options))
    np.testing.assert_allclose(pixels, on_white(image), atol=1)
    assert np.abs(pixels.astype(int) - np.asarray(image.convert("RGB"))).max() > 50


@pytest.mark.parametrize("mode", ["P", "RGB", "L"])
def test_a_transparent_colour_of_a_png_is_white(mode):
    image = Image.new("RGB", (8, 8), (10, 10, 10))
    image.paste((200, 200, 200), (0, 0, 4, 8))
    image = image.quantize(2) if mode == "P" else image.convert(mode)
    key = image.getpixel((7, 7))
    pixels = decode_image(encoded(image, "PNG", transparency=key))
    assert (pixels[:, 4:] == 255).all() and (pixels[:, :4] == 200).all()


def test_sixteen_bits_keep_their_high_byte():
    grey = (np.arange(HEIGHT * WIDTH).reshape(HEIGHT, WIDTH) * 25 % 65536).astype(np.uint16)
    for form in ("PNG", "TIFF"):
        pixels = decode_image(encoded(Image.fromarray(grey), form))
        np.testing.assert_array_equal(pixels, np.repeat((grey >> 8)[:, :, None], 3, axis=2))
    rows = b"".join(b"\0" + row.astype(">u2").repeat(3).tobytes() for row in grey)
    head = struct.pack(">IIBBBBB", WIDTH, HEIGHT, 16, 2, 0, 0, 0)
    data = png((b"IHDR", head), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    np.testing.assert_array_equal(decode_image(data), np.repeat((grey >> 8)[:, :, None], 3, axis=2))


def png(*chunks: tuple[bytes, bytes]) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in chunks
    )


# -- what is no image


@pytest.mark.parametrize(
    "kind", ["jpeg", "jpeg progressive", "jpeg cmyk", "png", "webp", "png grey"]
)
def test_a_cut_image_is_bad_wherever_it_is_cut(kind):
    data = OPAQUE[kind]
    for end in itertools.chain(range(0, len(data) - 40, 23), [len(data) - 40]):
        with pytest.raises(BadSample):
            decode_image(data[:end])


def test_damaged_pixels_are_bad_and_never_an_odd_error():
    draw = np.random.default_rng(1)
    found = 0
    for data in OPAQUE.values():
        for _ in range(60):
            damaged = bytearray(data)
            for at in draw.integers(0, len(data), 3):
                damaged[at] ^= int(draw.integers(1, 256))
            try:
                assert decode_image(bytes(damaged), 100_000).shape[2] == 3
            except BadSample as error:
                assert "\n" not in str(error)
                found += 1
    assert found > 200


def test_a_jpeg_with_broken_codes_is_bad_though_pillow_would_deliver_it():
    data, found = OPAQUE["jpeg progressive"], 0
    for at in range(len(data) // 2, len(data) - 2, 11):
        damaged = data[:at] + bytes([data[at] ^ 0x5A]) + data[at + 1 :]
        try:
            decode_image(damaged)
        except BadSample as error:
            if "damaged image: Corrupt JPEG data" in str(error):
                by_pillow(damaged)  # does not raise
                found += 1
    assert found > 10


@pytest.mark.parametrize("data", [b"", b"x", b"not an image at all", b"\xff\xd8\xff", b"\0" * 500])
def test_junk_is_bad(data):
    with pytest.raises(BadSample, match="not a readable image"):
        decode_image(data)
    assert image_size(data) == (0, 0)


@pytest.mark.parametrize("kind", OPAQUE)
def test_too_many_pixels_are_bad(kind):
    assert decode_image(OPAQUE[kind], WIDTH * HEIGHT).shape == (HEIGHT, WIDTH, 3)
    with pytest.raises(
        BadSample, match=rf"61x43 is more than data\.max_pixels = {WIDTH * HEIGHT - 1}"
    ):
        decode_image(OPAQUE[kind], WIDTH * HEIGHT - 1)


@pytest.mark.parametrize("side", [10_000, 60_000])
def test_a_bomb_is_seen_before_it_is_decoded(side):
    head = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    bomb = png((b"IHDR", head), (b"IDAT", zlib.compress(b"\0" * 1000)), (b"IEND", b""))
    with pytest.raises(BadSample, match=f"{side}x{side} is more than"):
        decode_image(bomb)
    tiff = encoded(Image.new("1", (side // 4, side // 4)), "TIFF", compression="group4")
    assert image_size(tiff) == (0, 0)  # only Pillow reads its header
    with pytest.raises(BadSample, match=r"is more than|exceeds limit"):
        decode_image(tiff, 1_000_000)


# -- sizes from headers


@pytest.mark.parametrize("kind", [kind for kind in OPAQUE if not kind.startswith(("tiff", "ppm"))])
def test_the_size_is_in_the_header(kind):
    data = OPAQUE[kind]
    assert image_size(data) == (WIDTH, HEIGHT)
    assert image_size(memoryview(data)[:1000]) == (WIDTH, HEIGHT)
    for end in range(40):
        assert image_size(data[:end]) in ((0, 0), (WIDTH, HEIGHT))


def test_the_size_of_a_jpeg_behind_a_long_profile():
    data = encoded(picture(), "JPEG", icc_profile=bytes(20_000))
    assert image_size(data) == (WIDTH, HEIGHT)
    assert image_size(data[:10_000]) == (0, 0)


def test_sizes_of_damaged_headers_never_raise():
    draw = np.random.default_rng(2)
    for data in OPAQUE.values():
        for _ in range(200):
            damaged = bytearray(data[: int(draw.integers(0, 900))])
            for at in draw.integers(0, max(1, len(damaged)), 4):
                if damaged:
                    damaged[at] = int(draw.integers(0, 256))
            width, height = image_size(bytes(damaged))
            assert width >= 0 and height >= 0
