"""Which identity a class number stands for: by name, so that a later run may have others.

Without a table an identity is called by its number; nothing is then stored.
"""

import csv
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa

from trainer.config import ConfigError


def load_identities(path: str) -> list[str]:
    """Names by class from a TSV with columns cls and name (cls 0, 1, ... each once, in any order).

    Other name columns of face sets are taken too: identity, label. Raises ConfigError naming the
    line.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"centers.identities = {path!r}: cannot be read: {error}") from None
    rows = csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
    columns = list(rows.fieldnames or [])
    column = next((name for name in ("name", "identity", "label") if name in columns), "")
    if "cls" not in columns or not column:
        raise ConfigError(
            f"centers.identities = {path!r}: needs columns cls and name, has {', '.join(columns)}"
        )
    names: dict[int, str] = {}
    for number, row in enumerate(rows, start=2):
        label, name = (row["cls"] or "").strip(), (row[column] or "").strip()
        if not label.isdecimal() or not name or int(label) in names:
            raise ConfigError(
                f"centers.identities = {path!r}: line {number}: cls {label!r} must be a number "
                f"that comes once, and {column} {name!r} not empty"
            )
        names[int(label)] = name
    return check_names([names.get(label, "") for label in range(max(names, default=-1) + 1)], path)


def check_names(names: list[str], origin: str) -> list[str]:
    """Raise ConfigError for a class without a name, or a name that two classes have."""
    if "" in names:
        raise ConfigError(f"{origin}: class {names.index('')} has no name; every class needs one")
    if len(set(names)) < len(names):
        seen: dict[str, int] = {}
        for label, name in enumerate(names):
            if seen.setdefault(name, label) != label:
                raise ConfigError(
                    f"{origin}: {name!r} is the name of classes {seen[name]} and {label}; "
                    "give each its own, or merge them with `nsphere centers merge`"
                )
    return names


def write_names(names: Sequence[str]) -> bytes:
    """The table as an Arrow file: columns row (int64) and name (string)."""
    table = pa.table(
        {"row": pa.array(range(len(names)), pa.int64()), "name": pa.array(names, pa.string())}
    )
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def read_names(path: Path) -> list[str]:
    """Names by row, as `write_names` wrote them."""
    with pa.OSFile(str(path)) as source:
        table = pa.ipc.open_file(source).read_all().sort_by("row")
    names: list[str] = table["name"].to_pylist()
    return names
