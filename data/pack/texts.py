"""Text files that packs read: what is no UTF-8 is one error, wherever in the file it stands."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from data.errors import DataError


@contextmanager
def utf8(path: Path) -> Iterator[None]:
    """DataError naming the file and the bytes, for what is read of it inside the block."""
    try:
        yield
    except UnicodeDecodeError as error:
        found = error.object[error.start : error.end]
        raise DataError(
            f"{path}: {found!r} is no UTF-8: write the file anew in that encoding (iconv does)"
        ) from None
