"""identities.tsv: what the class numbers of packed shards mean; columns cls and name, a line each.

It lies beside the shards. Plain text without quotes, so that a name holds no tab, no line end, and
no blank at its ends.
"""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from data.errors import DataError

IDENTITIES = "identities.tsv"
_HEADER = "cls\tname\n"


def read_identities(path: Path) -> pa.Table:
    """Columns cls (int64) and name (large_string), a name and a cls once each.

    Raises DataError for other columns, a cls that is no number, and one that comes twice.
    """
    types = {"cls": pa.int64(), "name": pa.large_string()}
    try:
        table = pyarrow.csv.read_csv(
            path,
            parse_options=pyarrow.csv.ParseOptions(delimiter="\t", quote_char=False),
            convert_options=pyarrow.csv.ConvertOptions(
                include_columns=list(types), column_types=types, strings_can_be_null=False
            ),
        ).combine_chunks()
    except (OSError, KeyError, pa.ArrowInvalid) as error:
        raise DataError(f"{path}: no table with the columns cls and name: {error}") from None
    check_one_to_one(table, [str(path)] * len(table))
    return table


def write_identities(path: Path, rows: Iterable[tuple[int, str]]) -> None:
    """Write (cls, name) lines, whole or not at all."""
    draft = path.with_name(f".{path.name}.{os.getpid()}.draft")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with draft.open("w", encoding="utf-8", newline="") as file:
            file.write(_HEADER)
            file.writelines(f"{number}\t{name}\n" for number, name in rows)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def check_name(name: str, origin: str) -> str:
    """The name, if it can stand in the table; DataError otherwise."""
    if not name.isprintable() and name.encode("utf-8", "replace").decode() != name:
        raise DataError(f"{origin}: an identity is called {name!r}, which is no UTF-8: rename it")
    if name and name == name.strip() and not any(mark in name for mark in "\t\r\n"):
        return name
    raise DataError(
        f"{origin}: an identity is called {name!r}: names hold no tab and no line end, and neither "
        "begin nor end with a blank"
    )


def check_one_to_one(table: pa.Table, origins: Sequence[str]) -> pa.Table:
    """The distinct rows, once it is known that each cls has one name and each name one cls."""
    numbers = table["cls"].to_numpy()
    codes = pc.dictionary_encode(table["name"].combine_chunks()).indices.to_numpy().astype(np.int64)
    for these, others, what in ((numbers, codes, "class"), (codes, numbers, "identity")):
        order = np.lexsort((others, these))
        same = these[order][1:] == these[order][:-1]
        differ = others[order][1:] != others[order][:-1]
        if (same & differ).any():
            _raise_disagreement(table, origins, order[int((same & differ).argmax()) :][:2], what)
    if numbers.size and numbers.min() < 0:
        row = int(numbers.argmin())
        raise DataError(f"{origins[row]}: cls {numbers[row]} of {table['name'][row]}: from 0 on")
    firsts = np.unique(numbers, return_index=True)[1]
    if len(firsts) == len(table):
        return table
    if len(set(origins)) == 1:
        raise DataError(f"{origins[0]}: a line stands there twice")
    return table.take(pa.array(firsts))


def _raise_disagreement(
    table: pa.Table, origins: Sequence[str], rows: np.ndarray, what: str
) -> None:
    told = [f"{origins[row]}: cls {table['cls'][row]} is {table['name'][row]}" for row in rows]
    raise DataError(
        f"{' and '.join(told)}: the same {what} twice; pack one set after the other with "
        "--identities naming the first one's table, so that they share one numbering"
    )
