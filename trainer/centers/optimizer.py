"""The rows of class centers and an optimizer that moves only the rows a step has touched.

A step is: `begin(ids)`, `rows(ids)` into the forward pass, `update(ids, gradients, lr)`, `end(lr)`.

Two modes, and what they mean for a row that a step does not touch:

- `lazy`: nothing. Momentum and decay act on a row when it is touched, and only then.
- `exact`: what a dense optimizer would have done is applied before the row is next read. For SGD
  both momentum and decay, equal to torch.optim.SGD on the whole table to rounding, under any
  learning-rate schedule; for AdamW and Adagrad the decay, while moments move with their row
  (`trainer/centers/rules.py` says why). One difference to a dense optimizer is meant: rows are kept
  within `norm_bounds` when they are touched, so where a bound acts the two part.

A step with non-finite gradients must not come here: the trainer agrees over the ranks to skip it,
calls neither `update` nor `end`, and tables stay as they were. `update` itself checks nothing, as
that would read every gradient once more; it would store what it is given.
"""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from trainer.centers.catch_up import CatchUp, due_rows
from trainer.centers.rows import (
    Ids,
    RoundingNoise,
    Scratch,
    Table,
    keep_in_bounds,
    rows_per_tile,
    tiles,
)
from trainer.centers.rules import RULES, Rule
from trainer.config import CentersConfig, ConfigError

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Two occasions to round a table in one step, each with noise of its own.
_CAUGHT_UP, _UPDATED = 0, 1
# Keys of rows are short work, which pays for many rows at once.
_TILES_PER_BLOCK = 64


class SparseOptimizer:
    """Rows of this rank's classes with their optimizer; local row i is global row first_row + i.

    Tables are in the memory of `device`, or with `config.host` in the host's (pinned when the
    device is a GPU), where they are then also updated: gradients come down, rows go up.
    """

    def __init__(
        self,
        config: CentersConfig,
        *,
        num_rows: int,
        dim: int,
        first_row: int,
        device: torch.device,
        seed: int,
        compute_dtype: torch.dtype = torch.float32,  # of `rows()`; float64: of the tables too
    ) -> None:
        self.num_rows, self.dim = num_rows, dim
        self.first_row, self._device, self._compute_dtype = first_row, device, compute_dtype
        self._bounds = config.norm_bounds
        self._home = torch.device("cpu") if config.host else device
        self._pinned = config.host and device.type == "cuda"
        self._rule: Rule = RULES[config.optimizer](config)
        double = compute_dtype == torch.float64
        self._dtype = torch.float64 if double else torch.float32  # of arithmetic
        self._tile_rows = rows_per_tile(dim, self._dtype, self._home)
        self._scratch = Scratch(self._tile_rows, dim, self._home)
        noise = RoundingNoise(seed, dim, first_row, self._home)
        dtypes = {"rows": _DTYPES[config.dtype]}
        dtypes |= dict.fromkeys(self._rule.wide, _DTYPES[config.momentum_dtype])
        self._wide = {
            name: Table(
                self._zeros((num_rows, dim), torch.float64 if double else dtype),
                name,
                self._scratch,
                noise,
            )
            for name, dtype in dtypes.items()
        }
        self._narrow = {
            name: self._zeros((num_rows,), self._dtype if dtype.is_floating_point else dtype)
            for name, dtype in self._rule.narrow.items()
        }
        self._step = 0
        self._catch_up: CatchUp | None = None
        if config.mode == "exact" and self._rule.missed:
            self._catch_up = CatchUp(len(self._rule.missed), self._home)
            self._last_step = self._zeros((num_rows,), torch.int32)

    def _zeros(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=self._home, pin_memory=self._pinned)

    def fill(self, start: int, rows: Tensor) -> None:
        """Set local rows from `start` on to `rows` (k, d), to the nearest in the table's dtype.

        Their optimizer starts anew.
        """
        part = slice(start, start + len(rows))
        if start < 0 or part.stop > self.num_rows:
            raise ValueError(f"rows {start} to {part.stop} of a part that has {self.num_rows}")
        for name, table in self._wide.items():
            if name == "rows":
                table.stored[part].copy_(rows)
            else:
                table.stored[part].zero_()
        for numbers in self._narrow.values():
            numbers[part] = 0
        if self._catch_up:
            self._last_step[part] = self._step

    def begin(self, ids: Ids) -> None:
        """Bring these rows to the present step, before they are read; lazy: they always are."""
        if self._catch_up is None:
            return
        ids = self._local(ids)
        behind = (self._last_step[ids] < self._step).nonzero()[:, 0]
        if len(behind) == 0:
            return
        if isinstance(ids, Tensor):
            ids = ids[behind]
        elif len(behind) < ids.stop - ids.start:
            ids = behind.add_(ids.start)
        for part, _, keys in self._tiles(ids, _CAUGHT_UP):
            ages = self._step - self._last_step[part]
            state = {name: self._wide[name].read(part) for name in self._rule.missed}
            room = self._scratch.take("room", len(ages), self._dtype)
            self._catch_up.apply(list(state.values()), ages, room)
            for name, values in state.items():
                self._wide[name].write(part, values, keys[name])
            self._last_step[part] = self._step

    def rows(self, ids: Ids) -> Tensor:
        """(k, d) in the dtype and on the device of computation, not to be written.

        A range of a table that is already of that kind is a view, which `update` then moves.
        """
        ids, stored = self._local(ids), self._wide["rows"].stored
        as_stored = stored.dtype == self._compute_dtype and stored.device == self._device
        if isinstance(ids, slice):
            return stored[ids].to(self._device, self._compute_dtype)
        if as_stored:
            return stored.index_select(0, ids)
        out = torch.empty((len(ids), self.dim), dtype=self._compute_dtype, device=self._device)
        for _, positions in tiles(ids, self._tile_rows):
            part = ids[positions]
            room = self._scratch.take("sent", len(part), stored.dtype, pinned=self._pinned)
            out[positions].copy_(torch.index_select(stored, 0, part, out=room))
        return out

    def update(self, ids: Ids, gradients: Tensor, lr: float) -> None:
        """Move these rows by `gradients` (k, d); each row at most once a step, after `begin`."""
        ids = self._local(ids)
        self._check_update(ids, gradients)
        for part, positions, keys in self._tiles(ids, _UPDATED):
            moved = gradients[positions].to(self._home, self._dtype).contiguous()
            wide = {name: table.read(part) for name, table in self._wide.items()}
            narrow = {name: numbers[part] for name, numbers in self._narrow.items()}
            self._rule.update({**wide, **narrow}, moved, lr, self._scratch)
            keep_in_bounds(wide["rows"], self._bounds)
            for name, values in wide.items():
                self._wide[name].write(part, values, keys[name])
            if isinstance(part, Tensor):
                for name, numbers in narrow.items():
                    self._narrow[name][part] = numbers
            if self._catch_up:
                self._last_step[part] = self._step + 1

    def end(self, lr: float) -> None:
        """Close a step that was taken, with its learning rate; on every rank alike."""
        self._step += 1
        if self._catch_up:
            self._catch_up.advance(self._rule.without_gradient(lr))
            self.begin(due_rows(self._step, self.first_row, self.num_rows))

    def finish(self) -> None:
        """Bring all rows to the present, for an export or an evaluation."""
        self.begin(slice(0, self.num_rows))

    def tables(self) -> dict[str, Tensor]:
        """All state that has one row, or one number, for each local row: the tables themselves."""
        tables = {name: table.stored for name, table in self._wide.items()} | self._narrow
        return tables | ({"last_step": self._last_step} if self._catch_up else {})

    def history(self) -> dict[str, Tensor]:
        """State that is equal on all ranks."""
        history = {"step": torch.tensor(self._step)}
        return history | ({"factors": self._catch_up.factors.cpu()} if self._catch_up else {})

    def load(self, tables: Mapping[str, Tensor], history: Mapping[str, Tensor]) -> None:
        """Take over `tables()` of the same global rows, held by however many ranks, and `history`.

        Another dtype is converted to the nearest value. A part too large to be held twice is
        copied into `tables()` by ranges instead, between `check_stored` and `load_history`.
        """
        self.check_stored(tables)
        own = self.tables()
        for name, table in own.items():
            if tables[name].shape != table.shape:
                raise ConfigError(
                    f"stored centers have {name} of shape {tuple(tables[name].shape)}, this part "
                    f"{tuple(table.shape)}: set model.embedding_dim, centers.num_classes and "
                    "centers.subcenters as they were"
                )
        self.load_history(history)
        for name, table in own.items():
            table.copy_(tables[name])

    def check_stored(self, names: Iterable[str], source: str | Path = "stored centers") -> None:
        """ConfigError unless the tables of these names are those that this optimizer keeps."""
        if {*names} != {*self.tables()}:
            raise ConfigError(
                f"{source}: tables {', '.join(sorted(names))}, but this configuration keeps "
                f"{', '.join(sorted(self.tables()))}: set centers.optimizer, mode, momentum and "
                "weight_decay as they were, or take over the centers alone with centers.init"
            )

    def load_history(self, history: Mapping[str, Tensor]) -> None:
        """Take over `history()`, when the tables hold what belongs to it."""
        own = self.history()
        if {n: t.shape for n, t in history.items()} != {n: t.shape for n, t in own.items()}:
            raise ConfigError(
                "the history of the stored centers is not of this optimizer: set "
                "centers.optimizer, mode, momentum and weight_decay as they were"
            )
        self._step = int(history["step"])
        if self._catch_up:
            self._catch_up.factors.copy_(history["factors"])

    @staticmethod
    def bytes_per_row(config: CentersConfig, dim: int) -> int:
        """Memory that a class takes, tables in all."""
        rule: Rule = RULES[config.optimizer](config)
        wide = _DTYPES[config.dtype].itemsize
        wide += len(rule.wide) * _DTYPES[config.momentum_dtype].itemsize
        narrow = sum(dtype.itemsize for dtype in rule.narrow.values())
        last_step = 4 if config.mode == "exact" and rule.missed else 0
        return wide * dim + narrow + last_step

    def _local(self, ids: Ids) -> Ids:
        """Positions where the tables are, or a range with its ends filled in."""
        if isinstance(ids, Tensor):
            return ids.to(self._home)
        start, stop, stride = ids.indices(self.num_rows)
        if stride != 1:
            raise ValueError(f"{ids} has a stride: give positions as a tensor")
        return slice(start, max(start, stop))

    def _tiles(
        self, ids: Ids, occasion: int
    ) -> Iterator[tuple[Ids, slice, dict[str, Tensor | None]]]:
        """(ids of a tile, their positions among all ids, each table's keys for rounding)."""
        for block, offset in tiles(ids, self._tile_rows * _TILES_PER_BLOCK):
            keys = {
                name: table.keys(block, self._step, 2 * index + occasion)
                for index, (name, table) in enumerate(self._wide.items())
            }
            for part, within in tiles(block, self._tile_rows):
                positions = slice(offset.start + within.start, offset.start + within.stop)
                yield part, positions, {n: k if k is None else k[within] for n, k in keys.items()}

    def _check_update(self, ids: Ids, gradients: Tensor) -> None:
        k = len(ids) if isinstance(ids, Tensor) else ids.stop - ids.start
        if gradients.shape != (k, self.dim):
            raise ValueError(f"gradients {tuple(gradients.shape)} for {k} rows of {self.dim}")
        if self._catch_up and bool((self._last_step[ids] != self._step).any()):
            raise RuntimeError("rows are not at the present step: begin(ids), then update, once")
