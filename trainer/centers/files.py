"""Class centers in a checkpoint: by global row range, so that any world size reads any other's.

centers/part-00000.safetensors   the tables of rank 0's rows; layout.json says which rows those are
centers/history.safetensors      what the optimizer knows that is equal on all ranks
centers/identities.arrow         row and name, where identities have names
centers/layout.json              sizes, the parts' ranges, the margin's running statistics
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from trainer.centers.identities import Int64s, NameTable
from trainer.centers.neighbours import Neighbours
from trainer.centers.optimizer import SparseOptimizer
from trainer.centers.parts import Part
from trainer.checkpoint import (
    CheckpointError,
    check,
    find_checkpoint,
    load_checkpoint_config,
)
from trainer.collectives import count_ranks, own_rank
from trainer.config import ConfigError
from trainer.durable import TensorFile

FOLDER = "centers"
FORMAT = 1
_READ_BYTES = 2**26  # at a time
_OF_CLASSES = "neighbours"  # a table with a row for each class, not for each center


class Carried(Protocol):
    """What a loss carries from step to step, as plain numbers."""

    def state(self) -> dict[str, float]:
        """What the checkpoint keeps."""

    def load(self, state: Mapping[str, float]) -> None:
        """Take it over."""


class CenterTable(Protocol):
    """Rows in parts over the ranks: centers of identities, or classifiers of labels."""

    num_classes: int
    dim: int
    subcenters: int
    steps: int
    group: ProcessGroup | None
    part: Part
    optimizer: SparseOptimizer

    @property
    def neighbours(self) -> Neighbours | None:
        """Nearest centers of each class, where they are kept."""

    @property
    def margin(self) -> Carried:
        """What carries numbers from step to step."""


def state_files(centers: CenterTable, names: NameTable | None) -> dict[str, Any]:
    """This rank's files, name -> content for `CheckpointFolder.save`; tables are the live ones."""
    rank, world_size = own_rank(centers.group), count_ranks(centers.group)
    tables = centers.optimizer.tables()
    if centers.neighbours is not None:
        tables = {**tables, _OF_CLASSES: centers.neighbours.lists}
    files: dict[str, Any] = {part_name(rank): tables}
    if rank == 0:
        parts = [Part.of_rank(centers.num_classes, r, world_size) for r in range(world_size)]
        files[f"{FOLDER}/layout.json"] = {
            "format": FORMAT,
            "num_classes": centers.num_classes,
            "dim": centers.dim,
            "subcenters": centers.subcenters,
            "steps": centers.steps,
            "margin": centers.margin.state(),
            "parts": [[part.start, part.stop] for part in parts],
        }
        files[f"{FOLDER}/history.safetensors"] = centers.optimizer.history()
        if names is not None:
            files[f"{FOLDER}/identities.arrow"] = names.to_arrow()
    return files


def part_name(rank: int) -> str:
    """File of a rank's rows."""
    return f"{FOLDER}/part-{rank:05d}.safetensors"


@dataclass(frozen=True)
class StoredCenters:
    """The centers of a checkpoint, read by global class range whoever wrote them."""

    folder: Path  # the checkpoint
    layout: dict[str, Any]
    parts: tuple[TensorFile, ...]

    @classmethod
    def open(cls, checkpoint: Path) -> "StoredCenters":
        """Read the layout and the parts' headers. Raises ConfigError where there are no centers."""
        path = checkpoint / FOLDER / "layout.json"
        if not path.is_file():
            raise ConfigError(f"{checkpoint}: holds no class centers (no {FOLDER}/layout.json)")
        layout = json.loads(path.read_text())
        if layout["format"] != FORMAT:
            raise ConfigError(f"{path}: format {layout['format']}, this version reads {FORMAT}")
        files = (TensorFile.open(checkpoint / part_name(r)) for r in range(len(layout["parts"])))
        return cls(checkpoint, layout, tuple(files))

    @classmethod
    def find(cls, source: Path) -> "StoredCenters":
        """Those of a run, a checkpoint, or a folder of `nsphere centers`, once it is whole.

        Raises CheckpointError and ConfigError saying what there is instead.
        """
        found = find_checkpoint(source)
        problem = check(found) if found == source else ""  # of a run, a whole one alone is found
        if problem:
            raise CheckpointError(f"{found}: {problem}")
        return cls.open(found)

    @property
    def num_classes(self) -> int:
        return int(self.layout["num_classes"])

    @property
    def dim(self) -> int:
        return int(self.layout["dim"])

    @property
    def subcenters(self) -> int:
        return int(self.layout["subcenters"])

    @property
    def steps(self) -> int:
        return int(self.layout["steps"])

    @property
    def dtype(self) -> torch.dtype:
        """Of the centers."""
        return self.parts[0].dtype("rows")

    @property
    def tables(self) -> list[str]:
        """Names of what is stored for each center or class."""
        return [name for name in self.parts[0].header if name != "__metadata__"]

    @property
    def has_names(self) -> bool:
        """False where identities are called by their numbers."""
        return self._identities.is_file()

    def names(self) -> NameTable | None:
        """The table from name to class, where there is one."""
        return NameTable.from_arrow(self._identities) if self.has_names else None

    @property
    def _identities(self) -> Path:
        return self.folder / FOLDER / "identities.arrow"

    def read(self, table: str, start: int, stop: int) -> Tensor:
        """Classes [start, stop) of a table, as stored."""
        blocks = [self.parts[0].rows(table, 0, 0)]
        for (first, end), file in zip(self.layout["parts"], self.parts, strict=True):
            low, high = max(start, first), min(stop, end)
            if low < high:
                each = 1 if table == _OF_CLASSES else self.subcenters
                blocks.append(file.rows(table, (low - first) * each, (high - first) * each))
        return torch.cat(blocks) if len(blocks) > 2 else blocks[-1]

    def ranges(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Classes [start, stop) cut into ranges of which all tables are read at once."""
        stored = sum(
            file.header[name]["data_offsets"][1] - file.header[name]["data_offsets"][0]
            for file in self.parts
            for name in self.tables
        )
        size = max(1, _READ_BYTES * self.num_classes // max(1, stored))
        for first in range(start, stop, size):
            yield first, min(first + size, stop)

    def present(
        self,
        wanted: Int64s | None = None,  # (k,) classes, rising; None: all
        *,
        start: int = 0,
    ) -> Iterator[tuple[int, Tensor]]:
        """Centers with all that untouched ones missed: a first class, and the centers from it on.

        As many of them as are read at once (k * subcenters, d), in the dtype they are stored in,
        from class `start` on; where none of a range is wanted it is not read. Raises ConfigError
        for a checkpoint whose config.toml does not belong to it.
        """
        behind = "last_step" in self.tables
        for first, end in self.ranges(start, self.num_classes):
            if wanted is not None:
                low, high = np.searchsorted(wanted, [first, end])
                if low == high:
                    continue
                first, end = int(wanted[low]), int(wanted[high - 1]) + 1
            yield first, self._catch_up(first, end) if behind else self.read("rows", first, end)

    def _catch_up(self, start: int, stop: int) -> Tensor:
        """Centers of classes [start, stop) at the checkpoint's own step."""
        config = load_checkpoint_config(self.folder)
        double = self.dtype == torch.float64
        optimizer = SparseOptimizer(
            config.centers,
            num_rows=(stop - start) * self.subcenters,
            dim=self.dim,
            first_row=start * self.subcenters,
            device=torch.device("cpu"),
            seed=config.train.seed,
            compute_dtype=torch.float64 if double else torch.float32,
        )
        tables = optimizer.tables()
        optimizer.check_stored(set(self.tables) - {_OF_CLASSES}, self.folder)
        for name, table in tables.items():
            table.copy_(self.read(name, start, stop))
        optimizer.load_history(self.history())
        optimizer.finish()
        return tables["rows"]

    def history(self) -> dict[str, Tensor]:
        """What the optimizer knows that is equal on all ranks."""
        return TensorFile.open(self.folder / FOLDER / "history.safetensors").whole()


def load_state(centers: CenterTable, checkpoint: Path) -> None:
    """Bring `centers` to the state that `state_files` stored, at any world size.

    Raises ConfigError naming what does not fit the configuration.
    """
    stored = StoredCenters.open(checkpoint)
    _check_layout(centers, stored)
    tables = centers.optimizer.tables()
    centers.optimizer.check_stored(set(stored.tables) - {_OF_CLASSES}, checkpoint)
    if centers.neighbours is not None and _OF_CLASSES in stored.tables:
        tables = {**tables, _OF_CLASSES: centers.neighbours.lists}
    part = centers.part
    for start, stop in stored.ranges(part.start, part.stop):
        for name, table in tables.items():
            each = 1 if name == _OF_CLASSES else centers.subcenters
            block = stored.read(name, start, stop)
            first = (start - part.start) * each
            table[first : first + len(block)].copy_(block)
    centers.optimizer.load_history(stored.history())
    centers.margin.load(stored.layout["margin"])
    centers.steps = stored.steps


def _check_layout(centers: CenterTable, stored: StoredCenters) -> None:
    """Raise ConfigError naming the settings under which the stored centers fit."""
    settings = [
        ("centers.num_classes", stored.num_classes, centers.num_classes),
        ("model.embedding_dim", stored.dim, centers.dim),
        ("centers.subcenters", stored.subcenters, centers.subcenters),
    ]
    lists = stored.parts[0].header.get(_OF_CLASSES)
    if centers.neighbours is not None and lists:
        own = centers.neighbours.lists.shape[1]
        settings.append(("centers.hard_neighbours", lists["shape"][1], own))
    differing = [
        f"{setting} = {there} (this run: {here})"
        for setting, there, here in settings
        if there != here
    ]
    if differing:
        raise ConfigError(
            f"{stored.folder}: its centers are of another shape: set {', '.join(differing)}"
        )
