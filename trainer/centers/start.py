"""Which rows the labels of a run stand for: one each, those of another run's centers, or its own's.

A label of the data has names (`centers.identities`, or its number), and a name has a row: in the
checkpoint that a run goes on from, and in the run or folder that `centers.init` names. Identities
that were merged there share a row here too.
"""

import logging
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch.distributed import ProcessGroup

from trainer.centers.centers import ClassCenters
from trainer.centers.files import StoredCenters
from trainer.centers.identities import Int64s, NameTable
from trainer.checkpoint import CheckpointError
from trainer.collectives import count_ranks, own_rank
from trainer.config import ConfigError

logger = logging.getLogger("nsphere.centers")


class Rows(NamedTuple):
    """How the labels of a run lie among the rows of its centers."""

    num_rows: int
    of_labels: Int64s | None  # (L,) row of each label; None: label i has row i
    names: NameTable | None  # of the rows; None: a row is called by its number
    sources: Int64s | None  # (count,) class of the centers started from, -1: none; None: nowhere


def assign_rows(labels: NameTable | None, num_labels: int) -> Rows:
    """A row for each label."""
    return Rows(num_labels, None, labels, None)


def assign_rows_from(source: StoredCenters, labels: NameTable | None, num_labels: int) -> Rows:
    """Rows for a run whose centers start from `source`, numbered by the first label of each.

    Labels whose names are one identity there share a row, and a row keeps the names it has there.
    Raises ConfigError where the source has none of them.
    """
    stored = source.names()
    if stored is None and labels is None:
        classes = np.arange(num_labels)
        return Rows(num_labels, None, None, np.where(classes < source.num_classes, classes, -1))
    known = stored or NameTable.of_numbers(source.num_classes)
    named = labels or NameTable.of_numbers(num_labels)
    classes = _classes_of(named, known)
    if (classes < 0).all():
        raise ConfigError(
            f"none of this run's identities ({_few(named)}) is in {source.folder} ({_few(known)}): "
            "set centers.identities to a TSV with the names that it knows"
        )
    # Labels that share a class share a row; one without a class has its own.
    keys = np.where(classes >= 0, classes, source.num_classes + np.arange(num_labels))
    _, first, place = np.unique(keys, return_index=True, return_inverse=True)
    order = np.argsort(first)
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    of_labels = rank[place]
    sources = classes[first[order]]
    names = _with_aliases(NameTable(named.names, of_labels[named.numbers]), known, sources)
    plain = len(sources) == num_labels  # then row i is that of label i
    return Rows(
        num_rows=len(sources),
        of_labels=None if plain else of_labels,
        names=None if labels is None and names.is_plain else names,
        sources=sources,
    )


def assign_rows_of(checkpoint: StoredCenters, labels: NameTable | None, num_labels: int) -> Rows:
    """Rows as the checkpoint of this very run has them.

    Raises ConfigError where the labels are not its identities.
    """
    stored = checkpoint.names()
    count, origin = checkpoint.num_classes, str(checkpoint.folder)
    if stored is None and labels is None:
        if count != num_labels:
            raise ConfigError(
                f"{origin} has {count:,} classes, this run {num_labels:,}: set centers.num_classes "
                "and the data as they were"
            )
        return Rows(count, None, None, None)
    known = stored or NameTable.of_numbers(count)
    named = labels or NameTable.of_numbers(num_labels)
    rows = _classes_of(named, known)
    for wrong, numbers, table in (
        ("this run has the identity {}, which it lacks", rows < 0, named),
        ("it has the identity {}, which this run lacks", _unused(rows, count), known),
    ):
        if numbers.any():
            name = table.first_names()[int(numbers.argmax())].as_py()
            raise ConfigError(
                f"{origin}: {wrong.format(repr(name))}: set centers.identities and the data as "
                'they were, or start a new run with centers.init = "THIS CHECKPOINT"'
            )
    same = count == num_labels and np.array_equal(rows, np.arange(count))
    return Rows(count, None if same else rows, stored, None)


def open_source(source: str, group: ProcessGroup | None) -> StoredCenters:
    """The centers that `centers.init` names, checked by one rank. Raises ConfigError on all."""
    found: list[tuple[Path | None, str]] = [(None, "")]
    if own_rank(group) == 0:
        try:
            found = [(StoredCenters.find(Path(source)).folder, "")]
        except (CheckpointError, ConfigError) as error:
            found = [(None, str(error))]
    if group is not None and count_ranks(group) > 1:
        dist.broadcast_object_list(found, group=group, group_src=0)
    folder, problem = found[0]
    if folder is None:
        raise ConfigError(f"centers.init = {source!r}: {problem}")
    return StoredCenters.open(folder)


def start_from(centers: ClassCenters, source: StoredCenters, sources: Int64s) -> None:
    """Put the rows of `source` in the place of those just drawn, a block at a time.

    `sources` is (num_classes,): the class there of each class here, -1 for one that stays as drawn.
    The optimizer starts anew. Every rank reads what it owns, at any world size.
    """
    for key, here in (("model.embedding_dim", centers.dim), ("subcenters", centers.subcenters)):
        there = source.dim if key.startswith("model") else source.subcenters
        if there != here:
            key = key if "." in key else f"centers.{key}"
            raise ConfigError(
                f"{source.folder}: its centers have {key} = {there}, this run {here}: set {key} "
                f"= {there}"
            )
    own = sources[centers.part.start : centers.part.stop]
    order = np.argsort(own, kind="stable")
    wanted = own[order]  # rising
    table = centers.optimizer.tables()["rows"]
    for first, rows in source.present(wanted[wanted >= 0]):
        block = rows.unflatten(0, (-1, centers.subcenters))
        low, high = np.searchsorted(wanted, [first, first + len(block)])
        places = torch.from_numpy(order[low:high]).to(table.device)
        taken = torch.from_numpy(wanted[low:high] - first)
        table.unflatten(0, (-1, centers.subcenters))[places] = block[taken].to(table)
    if own_rank(centers.group) == 0:
        kept = len(np.unique(sources[sources >= 0]))
        logger.info(
            "centers: %d of %d identities from %s, %d start anew; %d of it are not in this run",
            kept, len(sources), source.folder, len(sources) - kept, source.num_classes - kept,
        )  # fmt: skip


def _classes_of(labels: NameTable, known: NameTable) -> Int64s:
    """(L,) the class of each label, -1 where its name is not known."""
    classes = np.empty(len(labels.numbers), np.int64)
    classes[labels.numbers] = known.find(labels.names)
    return classes


def _with_aliases(names: NameTable, known: NameTable, sources: Int64s) -> NameTable:
    """With the other names that the source has for the rows taken from it."""
    row_of = np.full(known.numbers.max() + 1, -1)
    row_of[sources[sources >= 0]] = np.flatnonzero(sources >= 0)
    rows = row_of[known.numbers]
    others = (rows >= 0) & (names.find(known.names) < 0)
    if not others.any():
        return names
    added = known.names.filter(pa.array(others))
    return NameTable(
        pa.concat_arrays([names.names, added]), np.concatenate([names.numbers, rows[others]])
    )


def _unused(rows: Int64s, count: int) -> NDArray[np.bool_]:
    used = np.zeros(count, bool)
    used[rows[rows >= 0]] = True
    return ~used


def _few(table: NameTable) -> str:
    names = table.names[:3].to_pylist()
    return ", ".join(names) + (", ..." if len(table.names) > len(names) else "")
