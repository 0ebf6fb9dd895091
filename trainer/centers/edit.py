"""A table of centers made from a stored one: identities removed, merged, added.

The result is a small folder that `centers.init` takes: `centers/` as in a checkpoint but with the
present centers alone, identities.tsv (row and name, for people), the checkpoint's config.toml, and
a manifest. It appears whole or not at all.
"""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from torch.nn.functional import normalize

from trainer.centers.files import FOLDER, FORMAT, StoredCenters, part_name
from trainer.centers.identities import Int64s, NameTable
from trainer.checkpoint import FORMAT as MANIFEST_FORMAT
from trainer.checkpoint import MANIFEST
from trainer.config import ConfigError
from trainer.durable import RowStream, flush_folder, write_file

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Edit:
    """What becomes of the classes of a stored table."""

    kept: Int64s  # (k,) classes that stay, rising: they become rows [0, k)
    changed: Int64s  # (m,) those of them that get other centers, rising
    centers: Tensor  # (m, subcenters, d) float64
    added: Tensor  # (a, subcenters, d) float64, become rows [k, k + a)
    names: NameTable

    @property
    def num_classes(self) -> int:
        """Of the table that is made."""
        return len(self.kept) + len(self.added)


def names_of(stored: StoredCenters) -> NameTable:
    """The table from name to class; names are numbers where it has none."""
    return stored.names() or NameTable.of_numbers(stored.num_classes)


def remove(stored: StoredCenters, names: Sequence[str]) -> Edit:
    """Without these identities, by any of their names. Raises ConfigError for unknown ones."""
    table = names_of(stored)
    removed = np.unique(table.look_up_all(names, str(stored.folder)))
    kept = np.setdiff1d(np.arange(stored.num_classes), removed)
    if len(kept) < 2:
        raise ConfigError(
            f"{stored.folder}: {len(kept)} of {stored.num_classes} identities would be left; a "
            "softmax needs at least 2"
        )
    nothing = _no_centers(stored)
    return Edit(kept, kept[:0], nothing, nothing, _renumber(table, _places(stored, kept)))


def merge(stored: StoredCenters, groups: Sequence[Sequence[str]]) -> Edit:
    """Each group's identities as one, called by the first name; other names become aliases.

    Groups that share an identity are one group. Its center is the mean of the unit centers, with
    the mean of their lengths; sub-centers are matched to the first identity's, nearest first.
    Raises ConfigError for unknown names, and a group that is one identity already.
    """
    table = names_of(stored)
    classes = [table.look_up_all(group, str(stored.folder)) for group in groups]
    for group, members in zip(groups, classes, strict=True):
        if len(np.unique(members)) < 2:
            raise ConfigError(f"{stored.folder}: {', '.join(group)}: are one identity already")
    joined = _join(classes)
    heads = np.array(sorted(joined), np.int64)
    away = np.concatenate([joined[head][1:] for head in heads.tolist()])
    kept = np.setdiff1d(np.arange(stored.num_classes), away)
    places = _places(stored, kept)
    for head, members in joined.items():
        places[members] = places[head]
    found = read_classes(stored, np.unique(np.concatenate([heads, away])))
    centers = [_mean(torch.stack([found[c] for c in joined[head]])) for head in heads.tolist()]
    # A row is called by the first of its names: of the groups' first names, the earliest.
    rank = np.where(np.isin(table.numbers, away), 2, 1)
    leading = pa.array([group[0] for group in groups][::-1], pa.large_string())
    rank[table.places(leading)] = -np.arange(len(groups))
    order = np.argsort(rank, kind="stable")
    names = NameTable(table.names.take(pa.array(order)), places[table.numbers[order]])
    return Edit(kept, heads, torch.stack(centers), _no_centers(stored), names)


def add(stored: StoredCenters, names: Sequence[str], centers: Tensor) -> Edit:
    """With identities of these names and centers (a, subcenters, d) after the others."""
    table, count = names_of(stored), stored.num_classes
    kept = np.arange(count)
    numbers = np.concatenate([table.numbers, np.arange(count, count + len(names))])
    joined = NameTable(pa.concat_arrays([table.names, pa.array(names, pa.large_string())]), numbers)
    return Edit(kept, kept[:0], _no_centers(stored), centers.double(), joined)


def read_classes(stored: StoredCenters, classes: Int64s) -> dict[int, Tensor]:
    """Centers (subcenters, d) of some classes, rising, in float64."""
    found: dict[int, Tensor] = {}
    for first, rows in stored.present(classes):
        block = rows.unflatten(0, (-1, stored.subcenters))
        low, high = np.searchsorted(classes, [first, first + len(block)])
        found.update((c, block[c - first].double()) for c in classes[low:high].tolist())
    return found


def write_centers(
    stored: StoredCenters, edit: Edit, out: Path, progress: Progress | None = None
) -> Path:
    """Write the folder; a block of centers is in memory at a time. Raises ConfigError if it exists.

    A disk that is full or a stop leaves nothing behind under the folder's name.
    """
    check_free(out)
    total = edit.num_classes
    rows = RowStream(
        (total * stored.subcenters, stored.dim),
        stored.dtype,
        _iter_rows(stored, edit, progress or _silent),
    )
    files: dict[str, Any] = {
        part_name(0): {"rows": rows},
        f"{FOLDER}/layout.json": {
            **stored.layout,
            "format": FORMAT,
            "num_classes": total,
            "margin": {},
            "parts": [[0, total]],
        },
        "config.toml": (stored.folder / "config.toml").read_text(),
    }
    if not edit.names.is_plain:
        files[f"{FOLDER}/identities.arrow"] = edit.names.to_arrow()
        files["identities.tsv"] = edit.names.to_tsv()
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as name:
        folder = Path(name, out.name)
        records = {file: write_file(folder / file, item) for file, item in files.items()}
        write_file(folder / MANIFEST, {"format": MANIFEST_FORMAT, "files": records})
        for written in (folder / FOLDER, folder):
            flush_folder(written)
        if out.exists():
            out.rmdir()
        folder.rename(out)
    flush_folder(out.parent)
    return out


def check_free(out: Path) -> None:
    """Raise ConfigError where something stands there already."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} exists already: name another folder, nothing is overwritten")


def _iter_rows(stored: StoredCenters, edit: Edit, progress: Progress) -> Iterator[Tensor]:
    """All rows of the table that is made, in order."""
    for first, rows in stored.present(edit.kept):
        block = rows.unflatten(0, (-1, stored.subcenters))
        low, high = np.searchsorted(edit.kept, [first, first + len(block)])
        here = edit.kept[low:high]
        if len(here) < len(block):
            block = block[torch.from_numpy(here - first)]
        changed = np.arange(*np.searchsorted(edit.changed, [first, first + len(rows)]))
        changed = changed[np.isin(edit.changed[changed], here)]
        places = np.searchsorted(here, edit.changed[changed])
        block[torch.from_numpy(places)] = edit.centers[torch.from_numpy(changed)].to(block)
        yield block.flatten(0, 1)
        progress(int(high), edit.num_classes)
    yield edit.added.flatten(0, 1)


def _join(groups: Sequence[Int64s]) -> dict[int, Int64s]:
    """Groups of classes that share one become one: first class -> all, it first."""
    head: dict[int, int] = {}

    def find(c: int) -> int:
        while head.setdefault(c, c) != c:
            c = head[c]
        return c

    for group in groups:
        first, *others = group.tolist()
        for other in others:
            if find(other) != find(first):
                head[find(other)] = find(first)
    joined: dict[int, list[int]] = {}
    for c in head:
        joined.setdefault(find(c), []).append(c)
    return {
        c: np.array([c, *(other for other in members if other != c)])
        for c, members in joined.items()
    }


def _mean(centers: Tensor) -> Tensor:  # (g, subcenters, d) -> (subcenters, d)
    units = normalize(centers, dim=2)
    matched = torch.stack([units[0], *(each[_match(units[0], each)] for each in units[1:])])
    lengths = torch.linalg.vector_norm(centers, dim=2).mean()
    return normalize(matched.mean(0), dim=1) * lengths


def _match(to: Tensor, units: Tensor) -> Tensor:  # (s, d), (s, d) -> (s,)
    """Which of `units` goes with each of `to`: the nearest pair first, each once."""
    cosines = to @ units.T
    order = torch.empty(len(to), dtype=torch.int64)
    for _ in range(len(to)):
        row, column = divmod(int(cosines.argmax()), len(units))
        order[row] = column
        cosines[row], cosines[:, column] = -torch.inf, -torch.inf
    return order


def _places(stored: StoredCenters, kept: Int64s) -> Int64s:
    """(C,) the row that each class becomes, -1: none."""
    places = np.full(stored.num_classes, -1)
    places[kept] = np.arange(len(kept))
    return places


def _renumber(table: NameTable, places: Int64s) -> NameTable:
    rows = places[table.numbers]
    return NameTable(table.names.filter(pa.array(rows >= 0)), rows[rows >= 0])


def _no_centers(stored: StoredCenters) -> Tensor:
    return torch.empty(0, stored.subcenters, stored.dim, dtype=torch.float64)


def _silent(done: int, total: int) -> None:
    """No progress."""
