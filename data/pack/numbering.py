"""Class numbers of identities while packing: those of earlier packs stay, new ones follow."""

from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.errors import DataError
from data.names import IDENTITIES, check_name, read_identities, write_identities
from data.pack.writer import shard_pattern

MAX_LABEL = 100_000_000
"""Larger integer labels are no class numbers: a byte a class is kept while packing."""


class Naming(NamedTuple):
    """How identities are called and where their numbers start."""

    prefix: str | None = None
    """Identities are called PREFIX/NAME; None: only those whose names are digits, by the name of
    the folder they come from, so that person 17 of one set is not person 17 of another."""
    earlier: Path | None = None
    """identities.tsv of an earlier pack whose numbers stay; beside that of the shards' folder."""


NAMING = Naming()


class Numbering:
    """Name -> class number, starting from the table beside the shards and one that is given.

    Takes some 150 bytes an identity, nothing a sample.
    """

    def __init__(self, home: Path, out: str | Path, naming: Naming = NAMING) -> None:
        """`home` is the folder that identities come from, `out` as the packs take it.

        Raises DataError where the two tables disagree.
        """
        self.path = Path(shard_pattern(out)).parent / IDENTITIES
        self.known: dict[str, int] = {}
        for path in (self.path, naming.earlier):
            if path is not None and (path != self.path or path.is_file()):
                self._take(path)
        self.free = max(self.known.values(), default=-1) + 1
        """The first number after all that are known."""
        self._prefix, self._home = naming.prefix, home.resolve().name

    def name_of(self, identity: str) -> str:
        """What an identity is called in the table."""
        if self._prefix is None:
            return f"{self._home}/{identity}" if identity.isdecimal() else identity
        return f"{self._prefix}/{identity}" if self._prefix else identity

    def number(self, identity: str, origin: str) -> int:
        """The class of an identity; a new one gets the next number."""
        name = self.name_of(identity)
        number = self.known.get(name)
        if number is None:
            number = self.known[check_name(name, origin)] = self.free
            self.free += 1
        return number

    def save(self, more: Iterable[tuple[int, str]] = ()) -> None:
        """Write the table beside the shards: what is known, then more (class, name) pairs."""
        known = sorted((number, name) for name, number in self.known.items())
        write_identities(self.path, chain(known, more))

    def _take(self, path: Path) -> None:
        table = read_identities(path)
        pairs = zip(table["name"].to_pylist(), table["cls"].to_pylist(), strict=True)
        held = {number: name for name, number in self.known.items()}
        for name, number in pairs:
            if self.known.get(name, number) != number or held.get(number, name) != name:
                raise DataError(
                    f"{path}: cls {number} is {name}, and {self.path} says otherwise: pack into "
                    "another folder, or with the table that this folder's shards were packed with"
                )
            self.known[name] = number


class LabelNumbering:
    """Integer label -> class number: the label itself, after the classes of earlier packs.

    Where an earlier pack has this set's identities by name, labels keep the numbers they have
    there. Takes a byte a class, in the second case a name.
    """

    def __init__(self, home: Path, out: str | Path, naming: Naming = NAMING) -> None:
        """As `Numbering`."""
        self._numbering = Numbering(home, out, naming)
        start = self._numbering.name_of("0").removesuffix("0")
        self._by_name = any(
            name.startswith(start) and name.removeprefix(start).isdecimal()
            for name in self._numbering.known
        )
        self._first = self._numbering.free
        self._came = bytearray()  # by label, or by number where labels are looked up by name

    def number(self, label: int, origin: str) -> int:
        """The class of a label; DataError for one that is no class number."""
        if not 0 <= label < MAX_LABEL:
            raise DataError(
                f"{origin}: the label {label} is no class number: those count from 0 and stay below"
                f" {MAX_LABEL:,}; renumber the identities"
            )
        number = self._first + label
        if self._by_name:
            number = label = self._numbering.number(str(label), origin)
        if label >= len(self._came):
            self._came.extend(bytes(max(label + 1, 2 * len(self._came)) - len(self._came)))
        self._came[label] = 1
        return number

    @property
    def num_identities(self) -> int:
        """Distinct labels that came."""
        return sum(self._came)

    def save(self) -> None:
        """Write the table beside the shards."""
        came = np.frombuffer(b"" if self._by_name else self._came, np.uint8)
        name_of, first = self._numbering.name_of, self._first
        self._numbering.save(
            (first + int(label), name_of(str(label))) for label in np.flatnonzero(came)
        )
