"""Tables of an evaluation: which pairs to compare, who enrols and who searches.

Text files; columns are separated by tabs, commas or spaces. What they name is looked up in the
index before anything is embedded. The tables of IJB are in `ijb_tables.py`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.errors import DataError
from data.index import Index
from trainer.evaluate.identification import Roles
from trainer.evaluate.lookup import find_samples
from trainer.evaluate.verification import Pairs

FLAGS = {"1": True, "0": False, "-1": False, "true": True, "false": False}
FLAG_NAMES = ("same", "issame", "is_same", "label", "match", "target")
KEY_NAMES = ("key", "sample", "image", "file", "path", "name")
IDENTITY_NAMES = ("identity", "label", "subject", "id")
ROLES = {"gallery": True, "probe": False, "query": False}

Names = tuple[str, ...]


class Line(NamedTuple):
    """A line that is not empty, cut into columns."""

    number: int
    columns: list[str]


def load_pairs(path: str, index: Index) -> Pairs:
    """A table of pairs over the samples of an index, in the order of its lines.

    Forms: a header with a column `same` (or label, issame, match, target) and two others; no
    header, two keys and 1 or 0 (also -1, true, false) after or before them; LFW's own
    (`NAME 1 4` is a pair of one person, `NAME 1 OTHER 3` of two, counts in the first line).
    Raises DataError naming the line, or the samples that are in no shard.
    """
    lines = read_lines(path)
    parse = _parse_lfw if _is_lfw(lines) else _parse_columns
    first, second, same = parse(path, lines)
    samples = find_samples([*first, *second], index, path).reshape(2, -1).T
    pairs = Pairs(np.ascontiguousarray(samples), np.array(same, bool), path)
    pairs.check()
    return pairs


def load_roles(path: str, index: Index) -> Roles:
    """A table of who enrols and who searches: columns key, role (gallery or probe), identity.

    The last may be missing: the sample's label then says who it is. A header is known by its
    `role`. Raises DataError naming the line, or the samples that are in no shard.
    """
    lines = read_lines(path)
    header = [name.lower() for name in lines[0].columns]
    places = [0, 1, 2 if len(lines[0].columns) > 2 else -1]
    if "role" in header:
        places = [_place(header, names) for names in (KEY_NAMES, ("role",), IDENTITY_NAMES)]
        lines = lines[1:]
    key, role, identity = places
    if key < 0:
        raise DataError(f"{path}: line 1: the header {header} has no column key")
    names, enrols, whose = list[Names](), list[bool](), list[str]()
    for line in lines:
        _check_width(path, line, max(places) + 1)
        text = line.columns[role].lower()
        if text not in ROLES:
            raise DataError(f"{path}: line {line.number}: the role is {text!r}, not gallery, probe")
        names.append(spellings(line.columns[key]))
        enrols.append(ROLES[text])
        whose.append(line.columns[identity] if identity >= 0 else "")
    samples = find_samples(names, index, path)
    if len(np.unique(samples)) < len(samples):
        raise DataError(f"{path}: a sample has two lines: one role each")
    identities = index.labels[samples]
    if identity >= 0:
        identities = np.unique(whose, return_inverse=True)[1].astype(np.int64)
    elif identities.min(initial=0) < 0:
        place = int(np.argmin(identities))
        raise DataError(f"{path}: {names[place][0]!r} has no label; add a column identity")
    enrolled = np.array(enrols, bool)
    probes = np.flatnonzero(~enrolled)[np.argsort(samples[~enrolled])]
    return Roles(samples[enrolled], identities[enrolled], samples[probes], identities[probes], path)


def read_lines(path: str) -> list[Line]:
    """Lines of a table as columns. Raises DataError for a file that is none."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as a table: {error}") from None
    rows = [(number, row) for number, row in enumerate(text.splitlines(), 1) if row.strip()]
    if not rows:
        raise DataError(f"{path}: the table is empty")
    head = "\n".join(row for _, row in rows[:2])
    delimiter = next((mark for mark in "\t," if mark in head), None)
    return [
        Line(number, [field.strip() for field in row.strip().split(delimiter)])
        for number, row in rows
    ]


def spellings(name: str) -> Names:
    """A key as it stands there and without a file ending."""
    shard, colon, key = name.rpartition(":")
    folder, slash, base = key.rpartition("/")
    stem = base.partition(".")[0]
    return (name,) if not stem or stem == base else (name, shard + colon + folder + slash + stem)


Columns = tuple[list[Names], list[Names], list[bool]]


def _is_lfw(lines: Sequence[Line]) -> bool:
    return any(
        len(columns) == 4 and columns[1].isdigit() and columns[3].isdigit() for _, columns in lines
    )


def _parse_lfw(path: str, lines: Sequence[Line]) -> Columns:
    if all(column.isdigit() for column in lines[0].columns):
        lines = lines[1:]
    first, second, same = list[Names](), list[Names](), list[bool]()
    for line in lines:
        match line.columns:
            case [name, one, two] if one.isdigit() and two.isdigit():
                other = name
            case [name, one, other, two] if one.isdigit() and two.isdigit():
                pass
            case _:
                raise DataError(
                    f"{path}: line {line.number}: {' '.join(line.columns)!r} is neither "
                    "NAME N M nor NAME N OTHER M, as LFW's tables have"
                )
        first.append(_lfw_names(name, int(one)))
        second.append(_lfw_names(other, int(two)))
        same.append(len(line.columns) == 3)
    return first, second, same


def _lfw_names(name: str, number: int) -> Names:
    return f"{name}/{name}_{number:04d}", f"{name}_{number:04d}"


def _parse_columns(path: str, lines: Sequence[Line]) -> Columns:
    header = [name.lower() for name in lines[0].columns]
    flag = _place(header, FLAG_NAMES)
    if flag >= 0:
        lines = lines[1:]
    else:
        flag = _flag_column(path, lines)
    one, two = [place for place in range(len(header)) if place != flag][:2]
    first, second, same = list[Names](), list[Names](), list[bool]()
    for line in lines:
        _check_width(path, line, len(header))
        value = line.columns[flag].lower()
        if value not in FLAGS:
            raise DataError(
                f"{path}: line {line.number}: {line.columns[flag]!r} does not say whether the "
                "pair is the same: write 1 or 0"
            )
        first.append(spellings(line.columns[one]))
        second.append(spellings(line.columns[two]))
        same.append(FLAGS[value])
    return first, second, same


def _flag_column(path: str, lines: Sequence[Line]) -> int:
    """The last or the first column, whichever says 1 or 0 in the first line."""
    columns = lines[0].columns
    if len(columns) == 3:
        for place in (2, 0):
            if columns[place].lower() in FLAGS:
                return place
    raise DataError(
        f"{path}: line {lines[0].number}: {' '.join(columns)!r} is neither a pair (two keys and "
        "1 or 0) nor a header with a column same"
    )


def _place(header: Sequence[str], names: Sequence[str]) -> int:
    return next((place for place, name in enumerate(header) if name in names), -1)


def _check_width(path: str, line: Line, width: int) -> None:
    if len(line.columns) < width:
        raise DataError(
            f"{path}: line {line.number}: has {len(line.columns)} columns where the first line "
            f"has {width}"
        )
