"""Class centers in a checkpoint: by global row range, so that any world size reads any other's.

centers/part-00000.safetensors   the tables of rank 0's rows; layout.json says which rows those are
centers/history.safetensors      what the optimizer knows that is equal on all ranks
centers/identities.arrow         row and name, where identities have names
centers/layout.json              sizes, the parts' ranges, the margin's running statistics
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer.centers.centers import ClassCenters
from trainer.centers.identities import read_names, write_names
from trainer.centers.parts import Part
from trainer.collectives import count_ranks, own_rank
from trainer.config import ConfigError
from trainer.durable import TensorFile

FOLDER = "centers"
FORMAT = 1
_READ_BYTES = 2**26  # of a table at a time


def state_files(centers: ClassCenters, names: Sequence[str] | None) -> dict[str, Any]:
    """This rank's files, name -> content for `CheckpointFolder.save`; tables are the live ones."""
    rank, world_size = own_rank(centers.group), count_ranks(centers.group)
    tables = centers.optimizer.tables()
    if centers.neighbours is not None:
        tables = {**tables, "neighbours": centers.neighbours.lists}
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
        if names:
            files[f"{FOLDER}/identities.arrow"] = write_names(names)
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
    def tables(self) -> list[str]:
        """Names of what is stored for each row or class."""
        return [name for name in self.parts[0].header if name != "__metadata__"]

    def names(self) -> list[str] | None:
        """Identities by class; None where they are called by their numbers."""
        path = self.folder / FOLDER / "identities.arrow"
        return read_names(path) if path.is_file() else None

    def blocks(self, table: str, start: int, stop: int) -> Iterator[tuple[int, Tensor]]:
        """Classes [start, stop) of a table, a few at a time: the first class and all their rows."""
        for (first, end), file in zip(self.layout["parts"], self.parts, strict=True):
            low, high = max(start, first), min(stop, end)
            if low >= high:
                continue
            entry = file.header[table]
            each = entry["shape"][0] // (end - first)  # rows of a class
            begin, finish = entry["data_offsets"]
            size = max(1, _READ_BYTES * (end - first) // max(1, finish - begin))
            for at in range(low, high, size):
                to = min(at + size, high)
                yield at, file.rows(table, (at - first) * each, (to - first) * each)

    def rows(self, start: int, stop: int) -> Tensor:  # (k * subcenters, d)
        """Centers of classes [start, stop), as stored."""
        return torch.cat([block for _, block in self.blocks("rows", start, stop)])

    def history(self) -> dict[str, Tensor]:
        """What the optimizer knows that is equal on all ranks."""
        return TensorFile.open(self.folder / FOLDER / "history.safetensors").whole()


def load_state(centers: ClassCenters, checkpoint: Path) -> None:
    """Bring `centers` to the state that `state_files` stored, at any world size.

    Raises ConfigError naming what does not fit the configuration.
    """
    stored = StoredCenters.open(checkpoint)
    for name, own in (
        ("num_classes", centers.num_classes),
        ("dim", centers.dim),
        ("subcenters", centers.subcenters),
    ):
        if stored.layout[name] != own:
            raise ConfigError(
                f"{checkpoint}: its centers have {name} = {stored.layout[name]}, this run {own}"
            )
    tables = centers.optimizer.tables()
    centers.optimizer.check_stored(set(stored.tables) - {"neighbours"}, checkpoint)
    if centers.neighbours is not None and "neighbours" in stored.tables:
        tables = {**tables, "neighbours": centers.neighbours.lists}
    part = centers.part
    for name, table in tables.items():
        for start, block in stored.blocks(name, part.start, part.stop):
            each = len(table) // max(1, len(part))
            first = (start - part.start) * each
            table[first : first + len(block)].copy_(block)
    centers.optimizer.load_history(stored.history())
    centers.margin.load(stored.layout["margin"])
    centers.steps = int(stored.layout["steps"])
