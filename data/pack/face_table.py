"""A CSV, TSV or Parquet table of face images and identities -> shards with class numbers."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from data.errors import DataError
from data.pack.folder import plain_key
from data.pack.limits import LIMITS, ShardLimits
from data.pack.numbering import NAMING, LabelNumbering, Naming, Numbering
from data.pack.table import open_table, row_image
from data.pack.writer import LeftOut, Packed, Progress, pack_iterable


def pack_face_table(
    table: str | Path,
    out: str | Path,
    *,
    image_column: str,
    identity_column: str,
    key_column: str = "",
    naming: Naming = NAMING,
    limits: ShardLimits = LIMITS,
    progress: Progress | None = None,
) -> Packed:
    """Write one sample a row, in the order of the table; the table is read twice.

    The image is a path (relative ones from the table's folder), or, in Parquet, bytes or
    Hugging Face's {"bytes", "path"}. Identities are names, numbered in sorted order after those of
    earlier packs, or integers (in CSV: all of them digits), which are the classes. Rows without an
    image or an identity are left out and told. Raises DataError for a column that does not exist,
    identities that are neither names nor integers, and when nothing is left.
    """
    path = Path(table)
    numbering = _numbering(path, identity_column, out, naming)
    total, rows = open_table(path, [image_column, identity_column, *filter(None, [key_column])])
    left_out = LeftOut()
    seen: set[int] = set()

    def samples() -> Iterator[tuple[str, dict[str, Any]]]:
        for number, row in enumerate(rows):
            origin, identity = f"{path} row {number}", row[identity_column]
            if identity in (None, ""):
                left_out.add(f"{origin}: no identity")
                continue
            try:
                parts = row_image(row[image_column], path.parent)
            except DataError as error:
                left_out.add(f"{origin}: {error}")
                continue
            parts["cls"] = _class_of(identity, numbering, origin)
            seen.add(parts["cls"])
            yield plain_key(str(row[key_column])) if key_column else f"{number:09d}", parts

    packed = pack_iterable(
        samples(),
        out,
        max_samples=limits.max_samples,
        max_bytes=limits.max_bytes,
        total=total,
        progress=progress,
    )
    numbering.save()
    return replace(packed, left_out=left_out.told(), num_identities=len(seen))


def _class_of(identity: str | int, numbering: Numbering | LabelNumbering, origin: str) -> int:
    if isinstance(numbering, LabelNumbering):
        return numbering.number(int(identity), origin)
    return numbering.number(str(identity), origin)


def _numbering(
    path: Path, column: str, out: str | Path, naming: Naming
) -> Numbering | LabelNumbering:
    """By label where all identities are integers, else by name in sorted order."""
    home = path.resolve().parent
    names: set[str] = set()
    kinds: set[type] = set()
    for row in open_table(path, [column])[1]:
        value = row[column]
        if value in (None, ""):
            continue
        kinds.add(type(value))
        if isinstance(value, str):
            names.add(value)
    if not kinds <= {int, str}:
        told = ", ".join(sorted(kind.__name__ for kind in kinds - {int, str}))
        raise DataError(
            f"{path}: the column {column!r} holds {told}: an identity is a name or an integer"
        )
    digits = path.suffix.lower() != ".parquet" and all(name.isdecimal() for name in names)
    if digits or int in kinds:
        return LabelNumbering(home, out, naming)
    numbering = Numbering(home, out, naming)
    for name in sorted(names):
        numbering.number(name, f"{path}, column {column!r}")
    return numbering
