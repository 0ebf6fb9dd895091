"""Encoded images as packs take them: which member ending their bytes want."""

from data.decode import image_size
from data.errors import DataError

_ENDING_OF_MAGIC = (
    (b"\xff\xd8", "jpg"),
    (b"\x89PNG", "png"),
    (b"RIFF", "webp"),
)


def image_part(image: bytes) -> dict[str, bytes]:
    """{ending: image}; DataError for bytes that are no JPEG, PNG or WebP."""
    if image_size(image) == (0, 0):
        raise DataError("no image")
    for magic, ending in _ENDING_OF_MAGIC:
        if image.startswith(magic):
            return {ending: image}
    raise DataError("an image of another kind than JPEG, PNG and WebP")
