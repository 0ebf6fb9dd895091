"""Which identity a number stands for: by name, so that a later run may have others.

A `NameTable` names the labels of the data (`centers.identities`) or the rows of a checkpoint
(identities.arrow). Without a table an identity is called by its number; nothing is then stored.
"""

import difflib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from data.dataset import SampleSet
from data.errors import DataError
from data.labels import named_identities
from data.names import IDENTITIES, read_identities
from trainer.config import ConfigError

Int64s = NDArray[np.int64]

_COMPARED = 20_000  # names at most that are compared with one that is unknown
_LINES = 2**16  # that are Python strings at a time
_TOLD = 5  # unknown names at most that are told

logger = logging.getLogger("nsphere.centers")


@dataclass(frozen=True)
class NameTable:
    """Distinct names and the number that each stands for; merged identities share one.

    In Arrow's memory: ten million names take some 200 MB, as Python strings a gigabyte.
    """

    names: pa.LargeStringArray
    numbers: Int64s  # (len(names),) in [0, the largest + 1), each at least once

    @classmethod
    def of_numbers(cls, count: int) -> Self:
        """The table of identities without one: each is called by its number."""
        numbers = np.arange(count)
        return cls(pa.array(numbers).cast(pa.large_string()), numbers)

    @classmethod
    def of(cls, names: list[str], numbers: list[int] | None = None) -> Self:
        """From plain values; without `numbers`, name i is that of number i."""
        counted = range(len(names)) if numbers is None else numbers
        return cls(pa.array(names, pa.large_string()), np.fromiter(counted, np.int64, len(names)))

    @property
    def is_plain(self) -> bool:
        """True where every identity is called by its number, so that no table is needed."""
        return np.array_equal(self.numbers, np.arange(len(self.numbers))) and bool(
            self.names.equals(self.of_numbers(len(self.numbers)).names)
        )

    def places(self, names: pa.LargeStringArray) -> Int64s:  # (len(names),)
        """Where each name stands in the table, -1 where it does not."""
        return pc.index_in(names, value_set=self.names).fill_null(-1).to_numpy()

    def find(self, names: pa.LargeStringArray) -> Int64s:  # (len(names),)
        """The number of each name, -1 where it is not in the table."""
        places = self.places(names)
        return np.where(places < 0, -1, np.append(self.numbers, -1)[places])

    def first_names(self) -> pa.LargeStringArray:
        """One name a number, the first in the table; others are aliases."""
        return self.names.take(pa.array(np.unique(self.numbers, return_index=True)[1]))

    def look_up_all(self, names: Sequence[str], origin: str) -> Int64s:
        """The number of each name. Raises ConfigError, a line each with the nearest names."""
        numbers = self.find(pa.array(names, pa.large_string()))
        unknown = [name for name, number in zip(names, numbers, strict=True) if number < 0]
        lines = []
        for name in unknown[:_TOLD]:
            nearest = self.nearest(name)
            hint = f"nearest: {', '.join(nearest)}" if nearest else "none is like it"
            lines.append(f"{name!r} is no identity of {origin}; {hint}")
        if len(unknown) > _TOLD:
            lines.append(f"and {len(unknown) - _TOLD} others are not")
        if lines:
            raise ConfigError("\n".join(lines))
        return numbers

    def nearest(self, name: str) -> list[str]:
        """Up to three names that look like this one."""
        names = self.names
        if len(names) > _COMPARED:
            names = names.filter(pc.starts_with(names, name[:2]))[:_COMPARED]
        return difflib.get_close_matches(name, names.to_pylist(), n=3)

    def to_arrow(self) -> bytes:
        """As an Arrow file: columns name (string) and row (int64)."""
        table = pa.table({"name": self.names, "row": pa.array(self.numbers)})
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
        return sink.getvalue().to_pybytes()

    @classmethod
    def from_arrow(cls, path: Path) -> Self:
        """As `to_arrow` wrote it."""
        with pa.OSFile(str(path)) as source:
            table = pa.ipc.open_file(source).read_all().combine_chunks()
        names, rows = (table[column].combine_chunks() for column in ("name", "row"))
        return cls(names.cast(pa.large_string()), rows.to_numpy())

    def to_tsv(self) -> bytes:
        """For people: columns row and name, in the order of the rows, aliases below one another."""
        order = np.argsort(self.numbers, kind="stable")
        tab = pa.scalar("\t", pa.large_string())
        pieces = [b"row\tname\n"]
        for start in range(0, len(order), _LINES):
            places = order[start : start + _LINES]
            rows = pa.array(self.numbers[places]).cast(pa.large_string())
            lines = pc.binary_join_element_wise(rows, self.names.take(pa.array(places)), tab)
            pieces.append("\n".join([*lines.to_pylist(), ""]).encode())
        return b"".join(pieces)


def load_identities(path: str, option: str = "centers.identities") -> NameTable:
    """Names by label from a TSV with columns cls and name. Raises ConfigError for what is wrong."""
    try:
        return _of_labels(read_identities(Path(path)))
    except DataError as error:
        raise ConfigError(f"{option} = {path!r}: {error}") from None


def label_names(path: str, samples: SampleSet, num_labels: int) -> NameTable | None:
    """Names of labels [0, num_labels) from `path`, or from the tables that lie beside the shards.

    None where there are none: an identity is then called by its number. Raises ConfigError where a
    label has no name in `path`.
    """
    if path:
        table = load_identities(path)
    else:
        beside = named_identities(samples)
        if beside is None:
            return None
        table = _of_labels(beside)
    here = table.numbers < num_labels  # a table may also name the identities of other splits
    if not here.all():
        table = NameTable(table.names.filter(pa.array(here)), table.numbers[here])
    if len(table.numbers) == num_labels:
        return table
    nameless = int(np.setdiff1d(np.arange(num_labels), table.numbers)[0])
    if path:
        raise ConfigError(
            f"centers.identities = {path!r}: class {nameless} has no name; every class needs one"
        )
    logger.warning(
        "%s beside the shards does not name class %d: identities are called by their numbers",
        IDENTITIES, nameless,
    )  # fmt: skip
    return None


def _of_labels(table: pa.Table) -> NameTable:
    names, numbers = (table[column].combine_chunks() for column in ("name", "cls"))
    empty = pc.index(names, pa.scalar("", pa.large_string())).as_py()
    if empty >= 0:
        raise DataError(f"class {numbers[empty]} is called by an empty name")
    return NameTable(names, numbers.to_numpy())
