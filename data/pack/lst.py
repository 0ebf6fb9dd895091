"""MXNet's image list (.lst: index<TAB>label[<TAB>label ...]<TAB>path) -> shards; line by line."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from data.errors import DataError
from data.pack.images import image_part
from data.pack.limits import LIMITS, ShardLimits
from data.pack.numbering import NAMING, LabelNumbering, Naming
from data.pack.texts import utf8
from data.pack.writer import LeftOut, Packed, Progress, pack_iterable

_SCAN_BYTES = 1 << 20
_EXACT = 1 << 53  # decimal labels pass through a float64


class Line(NamedTuple):
    """One line of the list."""

    number: int
    labels: tuple[float, ...]
    path: str


def pack_lst(
    lst: str | Path,
    out: str | Path,
    *,
    root: str | Path | None = None,
    naming: Naming = NAMING,
    limits: ShardLimits = LIMITS,
    progress: Progress | None = None,
) -> Packed:
    """Write one sample a line, in the order of the list; its key is the line's index.

    Paths are relative to `root`, else to the list's folder. The class is the first label, after the
    classes of earlier packs; several labels go whole into the JSON field `labels`. Lines whose file
    is missing or no image are left out and told. Raises DataError for a line of another form, a
    label that is no class number, and when nothing is left.
    """
    path = Path(lst)
    if not path.is_file():
        raise DataError(f"{path}: no such list")
    folder = path.parent if root is None else Path(root)
    numbering = LabelNumbering(path.resolve().parent, out, naming)
    left_out = LeftOut()
    packed = pack_iterable(
        _iter_samples(path, folder, numbering, left_out),
        out,
        max_samples=limits.max_samples,
        max_bytes=limits.max_bytes,
        total=_num_lines(path),
        progress=progress,
    )
    numbering.save()
    return replace(packed, left_out=left_out.told(), num_identities=numbering.num_identities)


def parse_line(text: str, origin: str) -> Line:
    """Index, labels and path of a line. Raises DataError saying what is expected."""
    try:
        first, *labels, last = text.rstrip("\r\n").split("\t")
        if not labels or not last:
            raise ValueError
        return Line(int(first), tuple(float(label) for label in labels), last)
    except ValueError:
        raise DataError(
            f"{origin}: {text.rstrip()[:80]!r} is not index<TAB>label<TAB>path, several labels "
            "allowed"
        ) from None


def _iter_samples(
    path: Path, folder: Path, numbering: LabelNumbering, left_out: LeftOut
) -> Iterator[tuple[str, dict[str, Any]]]:
    with path.open(encoding="utf-8-sig", newline="\n") as file, utf8(path):
        for number, text in enumerate(file, start=1):
            if text.isspace():
                continue
            origin = f"{path} line {number}"
            line = parse_line(text, origin)
            label = line.labels[0]
            if not (label.is_integer() and 0 <= label < _EXACT):
                raise DataError(f"{origin}: the label {label:g} is no class number from 0 on")
            try:
                parts: dict[str, Any] = dict(image_part((folder / line.path).read_bytes()))
            except (DataError, OSError) as error:
                why = error.strerror if isinstance(error, OSError) else str(error)
                left_out.add(f"{origin}: {line.path}: {why}")
                continue
            parts["cls"] = numbering.number(int(label), origin)
            if len(line.labels) > 1:
                parts["json"] = {"labels": list(line.labels)}
            yield f"{line.number:09d}", parts


def _num_lines(path: Path) -> int:
    with path.open("rb") as file:
        return sum(piece.count(b"\n") for piece in iter(lambda: file.read(_SCAN_BYTES), b""))
