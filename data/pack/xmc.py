"""Extreme classification data sets -> shards of texts with lists of labels, and their label table.

A sample has the members `txt` and `labels` (integers with blanks between, ascending, each once).
labels.parquet lies beside the shards.
"""

import os
import shutil
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa

from data.errors import DataError
from data.filters import read_filter
from data.label_lists import LabelLists
from data.label_table import LABELS, LabelTable, read_label_table, write_label_table
from data.pack.label_documents import closure
from data.pack.limits import LIMITS, ShardLimits
from data.pack.writer import Packed, Progress, ShardWriter, shard_pattern
from data.pack.xmc_labels import find_label_texts, read_label_texts
from data.pack.xmc_rows import Document, Documents, Reading, open_documents
from data.rows import MAX_LABEL, Keys
from data.table import index_paths

XMC_KEYS = Keys(image="")
"""What the index of text-only shards is asked for."""
_PROGRESS_EVERY = 1000
_LISTED = 5


class Labelling(NamedTuple):
    """Where the labels' texts come from, and what is done about labels."""

    texts: Path | None = None
    """File of label texts; None: Y.txt, lbl.json, labels.tsv or labels.csv beside the documents."""
    columns: tuple[str, ...] = ()
    """Its columns that make a label's text; none: label_text, text, title or name."""
    table: Path | None = None
    """labels.parquet of the training split, for other splits: texts and counts stay its own."""
    missing_text: Literal["error", "number"] = "error"
    """A label without a text: an error, or called by its number."""
    empty: Literal["drop", "keep"] = "drop"
    """A document without a label: left out and told, or packed."""
    documents: Literal["none", "self", "closure", "implied"] = "none"
    """Label texts as further training documents, which have the label alone, it and those that it
    implies, or those alone (where no document has itself as a label, as in a hierarchy)."""
    document_columns: Sequence[str] = ()
    """Columns that make the text of a label document; none: the label's text."""
    share: float = 0.9
    """Of a label's documents that have another one too, for that to be implied."""


@dataclass(frozen=True)
class XmcPacked:
    """What was written."""

    packed: Packed
    table: Path
    num_labels: int
    num_positives: int
    """Pairs of a packed document and its label."""
    num_label_documents: int
    notes: tuple[str, ...]
    """For people: what was left out, merged or odd, with counts."""


def pack_xmc(
    documents: str | Path,
    out: str | Path,
    *,
    reading: Reading | None = None,
    labelling: Labelling | None = None,
    filter_list: Path | None = None,
    limits: ShardLimits = LIMITS,
    progress: Progress | None = None,
) -> XmcPacked:
    """Write one sample a document, in the order of the file, label documents last.

    `filter_list` is checked and copied beside the shards. Counts of the label table are those of
    every row of the file, packed or not. Memory: the label texts, 4 bytes a positive, 8 a document
    (a closure: see there). Raises DataError, and leaves nothing behind, for a label without text,
    an input that does not fit its header, and when nothing is left.
    """
    labelling = labelling or Labelling()
    pattern = shard_pattern(out)
    folder = Path(os.path.dirname(pattern) or ".")
    table_path = folder / LABELS
    _check_wishes(labelling, table_path)
    source = open_documents(documents, reading or Reading())
    naming = _Naming.open(source, labelling)
    pairs = read_filter(filter_list) if filter_list else []
    if pairs:
        naming.check(max(label for _, label in pairs), str(filter_list))
    writer = ShardWriter(pattern, **limits._asdict(), keys=XMC_KEYS)
    intake = _Intake(source, naming, labelling, progress)
    try:
        with writer:
            for key, parts in intake.samples():
                writer.write(key, parts)
        if not writer.num_samples:
            raise DataError(f"nothing to write to {out}: {source.path} has no usable document")
        _leave_table(table_path, intake, labelling)
        if filter_list is not None and not _same(folder / filter_list.name, filter_list):
            shutil.copyfile(filter_list, folder / filter_list.name)
    except BaseException:
        for shard in writer.shards:
            for path in (Path(shard), *index_paths(shard)):
                path.unlink(missing_ok=True)
        raise
    return intake.told(Packed(tuple(writer.shards), writer.num_samples), table_path)


def _check_wishes(labelling: Labelling, place: Path) -> None:
    """DataError for wishes that contradict each other, or the label table that is in its place."""
    if labelling.table and labelling.documents != "none":
        raise DataError("label documents belong to the training split, not beside --labels")
    if labelling.document_columns and labelling.documents == "none":
        raise DataError("--document-columns needs --label-documents")
    if not 0 < labelling.share <= 1:
        raise DataError(f"--closure {labelling.share:g}: a share above 0, 1 at most")
    if place.exists() and not (labelling.table and _same(place, labelling.table)):
        raise DataError(
            f"{place} exists: shards of one folder share one label table; delete it, write to "
            f"another folder, or take it over with --labels {place}"
        )


class _Naming:
    """Texts of labels, and whether a label has one."""

    def __init__(self, texts: list[str], origin: str, *, by_number: bool) -> None:
        self.texts = texts
        self._origin = origin
        self._by_number = by_number
        self._num_known = len(texts)
        self.notes: list[str] = []
        self.document_texts: list[str] = []
        """Of label documents, where those are not the labels' own."""
        if not by_number and "" in texts:
            raise DataError(
                f"{origin}: label {texts.index('')} has no text ({texts.count(''):,} such); give "
                "it one, or call such labels by their numbers with --missing-text number"
            )

    @classmethod
    def open(cls, source: Documents, labelling: Labelling) -> "_Naming":
        by_number = labelling.missing_text == "number"
        if labelling.table is not None:
            texts = read_label_table(labelling.table).texts_of()
            naming = cls(texts, str(labelling.table), by_number=False)
        else:
            naming = cls._from_texts(source, labelling, by_number=by_number)
        if source.num_labels:
            naming.check(source.num_labels - 1, f"the header of {source.path}")
        return naming

    @classmethod
    def _from_texts(cls, source: Documents, labelling: Labelling, *, by_number: bool) -> "_Naming":
        path = labelling.texts or find_label_texts(source.path)
        if path is None:
            if not by_number:
                raise DataError(
                    f"{source.path}: no label texts beside it (Y.txt, lbl.json, labels.tsv): name "
                    "them with --label-texts, or --missing-text number calls labels by number"
                )
            return cls([], str(source.path), by_number=True)
        found = read_label_texts(path, labelling.columns)
        naming = cls(found.texts, str(path), by_number=by_number)
        naming.notes += found.notes
        if labelling.document_columns:
            own = read_label_texts(path, labelling.document_columns).texts
            naming.document_texts = own + [""] * (len(found.texts) - len(own))
        if 0 < source.num_labels < len(found.texts):
            raise DataError(
                f"{path} has {len(found.texts):,} labels, and the header of {source.path} says "
                f"{source.num_labels:,}"
            )
        return naming

    def check(self, label: int, origin: str) -> None:
        """DataError for a label without a text; by number, every label has one."""
        if label < len(self.texts):
            return
        if not self._by_number or label > MAX_LABEL:
            raise DataError(
                f"{origin}: label {label} has no text: {self._origin} ends at label "
                f"{len(self.texts) - 1}"
            )
        self.texts += [""] * (label + 1 - len(self.texts))

    def named(self) -> tuple[list[str], list[bool]]:
        """All texts, numbers where there is none; and which were there."""
        known = [bool(text) for text in self.texts]
        return [text or str(label) for label, text in enumerate(self.texts)], known


class _Intake:
    """Documents -> samples, with everything that is counted on the way."""

    def __init__(
        self,
        source: Documents,
        naming: _Naming,
        labelling: Labelling,
        progress: Progress | None,
    ) -> None:
        self.source, self.naming, self.labelling = source, naming, labelling
        self._progress = progress
        self._ids, self._counts = array("i"), array("q")
        self._positives = self._label_documents = self._repeated = self._packed_empty = 0
        self._no_label, self._no_text = _Count(), _Count()

    def samples(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """(key, parts) of every document that is packed, then of label documents."""
        done = 0
        for done, document in enumerate(self.source.rows, 1):
            labels = self._take(document)
            if not document.text or document.text.isspace():
                self._no_text.add(document.key)
            elif not labels and self.labelling.empty == "drop":
                self._no_label.add(document.key)
            else:
                self._packed_empty += not labels
                yield document.key, self._parts(document.text, labels)
            if self._progress is not None and done % _PROGRESS_EVERY == 0:
                self._progress(done, self.source.num_rows)
        if self._progress is not None and done:
            self._progress(done, done)
        if self.labelling.documents != "none":
            yield from self._labels_as_documents()

    def table(self) -> LabelTable:
        """Texts, counts over all rows, and how many rows there were."""
        texts, _ = self.naming.named()
        ids = np.array(self._ids, np.int32)
        counts = np.bincount(ids, minlength=len(texts)).astype(np.int64)
        return LabelTable(pa.array(texts, pa.large_string()), counts, len(self._counts))

    def told(self, packed: Packed, table: Path) -> XmcPacked:
        """The summary."""
        texts, known = self.naming.named()
        notes = [*self.naming.notes, *self.source.notes()]
        if self._no_label.num:
            notes.append(f"left out: {self._no_label} without labels (--empty keep packs them)")
        if self._packed_empty:
            notes.append(f"{self._packed_empty:,} documents without labels are packed")
        if self._no_text.num:
            notes.append(f"left out: {self._no_text} without text")
        if self._repeated:
            notes.append(f"{self._repeated:,} labels that a document has twice count once")
        if (num := known.count(False)) and not self.labelling.table:
            notes.append(f"{num:,} labels without text are called by their numbers")
        return XmcPacked(
            packed, table, len(texts), self._positives, self._label_documents, tuple(notes)
        )

    def _take(self, document: Document) -> list[int]:
        labels = sorted(set(document.labels))
        self._repeated += len(document.labels) - len(labels)
        if labels and labels[0] < 0:
            self._fail(document, f"label {labels[0]}: labels count from 0")
        if labels:
            self.naming.check(labels[-1], f"{self.source.path}, document {document.key}")
        self._ids.extend(labels)
        self._counts.append(len(labels))
        return labels

    def _parts(self, text: str, labels: Sequence[int]) -> dict[str, Any]:
        self._positives += len(labels)
        return {"txt": text, "labels": " ".join(map(str, labels))}

    def _labels_as_documents(self) -> Iterator[tuple[str, dict[str, Any]]]:
        texts, known = self.naming.named()
        wish = self.labelling.documents
        implied: Iterator[tuple[int, Sequence[int]]] = ((i, (i,)) for i in range(len(texts)))
        if wish != "self":
            offsets = np.zeros(len(self._counts) + 1, np.int64)
            np.cumsum(self._counts, out=offsets[1:])
            lists = LabelLists(offsets, np.array(self._ids, np.int32))
            implied = (
                (label, labels[labels != label].tolist() if wish == "implied" else labels.tolist())
                for label, labels in closure(lists, len(texts), self.labelling.share)
            )
        texts = self.naming.document_texts or texts
        for label, labels in implied:
            if known[label] and labels and texts[label]:
                self._label_documents += 1
                yield f"label-{label}", self._parts(texts[label], labels)

    def _fail(self, document: Document, what: str) -> None:
        raise DataError(f"{self.source.path}, document {document.key}: {what}")


class _Count:
    """How many documents, and the keys of the first."""

    def __init__(self) -> None:
        self.num = 0
        self._first: list[str] = []

    def add(self, key: str) -> None:
        self.num += 1
        if len(self._first) < _LISTED:
            self._first.append(key)

    def __str__(self) -> str:
        more = ", ..." if self.num > len(self._first) else ""
        return f"{self.num:,} documents ({', '.join(self._first)}{more})"


def _leave_table(path: Path, intake: _Intake, labelling: Labelling) -> None:
    """The new table, or the training split's as it is."""
    if labelling.table is None:
        write_label_table(path, intake.table())
    elif not _same(path, labelling.table):
        draft = path.with_name(f".{path.name}.{os.getpid()}.draft")
        shutil.copyfile(labelling.table, draft)
        os.replace(draft, path)


def _same(path: Path, other: Path) -> bool:
    return path.exists() and other.exists() and os.path.samefile(path, other)
