"""labels.parquet: what the labels of packed texts are called, and how often each comes in training.

Columns label (0 to L - 1, each once), text and train_count; the schema's metadata say of how many
training points the counts are. It lies beside the shards.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from data.errors import DataError
from data.shards import local_path

LABELS = "labels.parquet"
_METADATA = b"nsphere"

Int64s = NDArray[np.int64]


@dataclass(frozen=True)
class LabelTable:
    """Labels 0 to L - 1."""

    texts: pa.LargeStringArray  # (L,)
    train_count: Int64s  # (L,) training points that have the label
    num_points: int
    """Training points that were counted, those without a label too; 0 when unknown."""

    @property
    def num_labels(self) -> int:
        """L."""
        return len(self.texts)

    def text(self, label: int) -> str:
        """What one label is called."""
        return str(self.texts[label].as_py())

    def texts_of(self, labels: Int64s | Sequence[int] | None = None) -> list[str]:
        """What these labels, or all, are called."""
        if labels is None:
            return list(self.texts.to_pylist())
        return list(self.texts.take(pa.array(labels, pa.int64())).to_pylist())

    def check_ids(self, num_labels: int, origin: str) -> None:
        """DataError unless labels below `num_labels`, as `origin` has them, all have a text."""
        if num_labels > self.num_labels:
            raise DataError(
                f"{origin} has the label {num_labels - 1}, and the label table ends at "
                f"{self.num_labels - 1}: that label has no text; name the table that these shards "
                "were packed with (labels.table), or pack them with --labels"
            )


def find_label_table(shards: Sequence[str], path: str = "") -> Path:
    """`path`, or the table beside these shards.

    Raises DataError where there is none, and where those of several folders differ.
    """
    if path:
        if not Path(path).is_file():
            raise DataError(f"labels.table = {path}: no such file")
        return Path(path)
    local = [found for found in map(local_path, shards) if found is not None]
    folders = list(dict.fromkeys(os.path.dirname(found) for found in local))
    tables = [Path(folder, LABELS) for folder in folders]
    found = [table for table in tables if table.is_file()]
    if not found:
        place = folders[0] or "." if folders else shards[0] if shards else "no shards"
        raise DataError(
            f"{place}: no {LABELS} beside the shards; nsphere pack xmc writes it, or name one with "
            "labels.table"
        )
    first = found[0].read_bytes()
    for other in found[1:]:
        if other.read_bytes() != first:
            raise DataError(
                f"{found[0]} and {other} differ: one run has one label table; pack the second set "
                "with --labels naming the first one's, or set labels.table"
            )
    return found[0]


def read_label_table(path: str | Path) -> LabelTable:
    """Open a table; rows may stand in any order, and train_count may be missing (then 0).

    Raises DataError naming the label that has no text, comes twice, or is missing below L.
    """
    try:
        file = pq.ParquetFile(path)
        names = file.schema_arrow.names
        wanted = [name for name in ("label", "text", "train_count") if name in names]
        table = file.read(wanted)
        facts = json.loads((file.schema_arrow.metadata or {}).get(_METADATA, b"{}"))
        numbers = table["label"].cast(pa.int64()).combine_chunks()
        texts = table["text"].cast(pa.large_string()).combine_chunks()
        counts = table["train_count"].cast(pa.int64()).to_numpy() if wanted[2:] else None
    except (OSError, KeyError, ValueError, pa.ArrowException) as error:
        raise DataError(
            f"{path}: no label table with the columns label (integer) and text: {error}"
        ) from None
    order = _check_numbers(path, numbers)
    texts = texts.take(pa.array(order))
    _check_texts(path, texts)
    counts = np.zeros(len(texts), np.int64) if counts is None else counts[order].astype(np.int64)
    return LabelTable(texts, counts, int(facts.get("num_points", 0)))


def write_label_table(path: Path, table: LabelTable) -> None:
    """Write it whole or not at all, and durably."""
    rows = pa.table(
        {
            "label": pa.array(np.arange(table.num_labels, dtype=np.int32)),
            "text": table.texts,
            "train_count": pa.array(table.train_count, pa.int64()),
        }
    ).replace_schema_metadata({_METADATA: json.dumps({"num_points": table.num_points}).encode()})
    draft = path.with_name(f".{path.name}.{os.getpid()}.draft")
    try:
        with draft.open("wb") as file:
            pq.write_table(rows, file, compression="zstd")
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def _check_numbers(path: str | Path, numbers: Any) -> Int64s:  # (L,) rows by label
    """Where each label's row stands, once it is known that they count from 0 without a gap."""
    if numbers.null_count or not len(numbers):
        raise DataError(f"{path}: {'a row without a label' if len(numbers) else 'no label'}")
    found = numbers.to_numpy()
    order = np.argsort(found, kind="stable")
    wrong = found[order] != np.arange(len(found))
    if wrong.any():
        place = int(wrong.argmax())
        label = int(found[order][place])
        if label < 0:
            raise DataError(f"{path}: label {label}: labels count from 0")
        if place and label == found[order][place - 1]:
            raise DataError(f"{path}: label {label} stands there twice")
        raise DataError(
            f"{path}: label {place} is missing, and {label} is there: labels count from 0 to "
            "L - 1, a row each"
        )
    return np.asarray(order, np.int64)


def _check_texts(path: str | Path, texts: Any) -> None:
    blank = pc.fill_null(pc.equal(pc.utf8_trim_whitespace(texts), ""), True).to_numpy(
        zero_copy_only=False
    )
    if blank.any():
        raise DataError(
            f"{path}: label {int(blank.argmax())} has no text ({int(blank.sum()):,} such): give it "
            "one, or pack with --missing-text number"
        )
