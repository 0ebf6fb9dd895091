"""Every pair of a stationary and a visiting row, a tile of inner products at a time.

A statistics pass is a plain loop over `tiles()`; the weights pass is `gradients()`, which turns
pair weights `dL/dvalue` into the gradients of both sides. Rows of the stationary side are complete
on their rank; columns are completed by `merge_columns`, at the cost of O(N) numbers.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from trainer.collectives import gather_counts, gather_rows, own_rank, return_rows
from trainer.similarity.visiting import Visit, build_visiting

# Side of a tile. On a CPU larger products are faster until a float32 tile leaves a core's cache of
# about 2 MiB (measured at d = 512); a GPU wants products large enough to fill it.
_TILE = {"cpu": 768}
_TILE_ELSEWHERE = 4096
# Tiles of the first sweep are kept for the later ones while they take no more than 1.5 times the
# memory of both sides' rows, or 96 MiB in float32: linear in the batch, and a batch of a few
# thousand rows is never multiplied twice.
_KEPT_OF_ROWS = 1.5
_KEPT_ELEMENTS = 24 * 2**20


class StationaryRows(Protocol):
    """Rows that are read a block at a time: class centers, of which no copy is ever whole."""

    shape: tuple[int, int]
    dtype: torch.dtype
    device: torch.device

    def read(self, rows: slice) -> Tensor:
        """Rows at these positions, in the dtype of computation."""


@dataclass(frozen=True)
class Tile:
    """Inner products of some stationary rows with some visiting rows."""

    values: Tensor
    """(m, k). To be read, and pairs excluded, in a statistics pass; the last sweep may reuse it."""
    rows: slice
    """Positions among this rank's stationary rows."""
    columns: slice
    """Positions among all N visiting rows."""
    diagonal: int
    """Offset of the diagonal on which a row meets the visitor of its own position."""
    scratch: Tensor
    """(m, k) to write into; shared by all tiles."""
    row_block: Tensor
    """(m, d) the stationary rows themselves."""
    column_block: Tensor
    """(k, d) the visiting rows themselves."""

    def own_pairs(self, table: Tensor) -> Tensor:
        """The entries of an (m, k) table where a row meets its own visitor: a view."""
        m, k = table.shape
        return table.diagonal(min(max(self.diagonal, -m), k))


class Pairs:
    """The pairs of this rank's rows with every rank's visiting rows, their products times a factor.

    Multiplying by the factor is left to the matrix product, which neither copies nor rounds rows.
    """

    def __init__(
        self,
        rows: Tensor | StationaryRows,  # (n, d) stationary, in the dtype of computation
        visitors: Tensor,  # (n, d) this rank's visiting rows, in the dtype that travels
        group: ProcessGroup | None,
        *,
        factor: float = 1.0,
        visiting: str = "gather",
        tile: int | None = None,
        swept_once: bool = False,  # keep no tiles: there will be no second sweep
    ) -> None:
        if tile is not None and tile < 1:
            raise ValueError(f"tile={tile} is no size: give a number of rows of at least 1")
        self.rows = rows.contiguous() if isinstance(rows, Tensor) else rows
        self._read = self.rows.__getitem__ if isinstance(self.rows, Tensor) else self.rows.read
        self._group, self._visitors, self._factor = group, visitors, factor
        self._tile = tile or tile_side(rows.device)
        self._counts = gather_counts(len(visitors), group, rows.device)
        self._visiting = build_visiting(visiting, visitors, self._counts, group, rows.dtype)
        self._start = sum(self._counts[: own_rank(group)])
        self._buffers: dict[str, Tensor] = {}
        self._kept: dict[tuple[int, int], Tensor] = {}
        # One block: freed tile by tile, memory would stay with the C library instead.
        self._room = self._empty(0 if swept_once else self._elements_kept())

    @property
    def num_rows(self) -> int:
        """n, this rank's stationary rows."""
        return self.rows.shape[0]

    @property
    def num_columns(self) -> int:
        """N, all ranks' visiting rows."""
        return sum(self._counts)

    @property
    def tile(self) -> int:
        """Side of a tile: the rows of a sweep come in blocks of so many, the last perhaps fewer."""
        return self._tile

    @property
    def world_size(self) -> int:
        """W, the number of ranks."""
        return len(self._counts)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of computation."""
        return self.rows.dtype

    @property
    def device(self) -> torch.device:
        """Where the rows are."""
        return self.rows.device

    def bound(self) -> float:
        """No value of any rank is larger in magnitude: the factor times the longest rows."""
        rows = self._read(slice(0, self.num_rows))
        norms = torch.stack([_longest(rows), _longest(self._visitors.to(self.dtype))])
        everyone = gather_rows(norms.unsqueeze(0), [1] * self.world_size, self._group)
        return abs(self._factor) * float(everyone.amax(0).prod())

    def visitors(self) -> Tensor:  # (N, d)
        """All visiting rows in the dtype of computation; they must be gathered, not in a ring."""
        (visit,) = self._visiting.visits()
        return visit.rows

    def _elements_kept(self) -> int:
        return elements_kept(self.num_rows, self.num_columns, self.rows.shape[1])

    def own_columns(self, rows: slice) -> slice:
        """Positions, among all visitors, of this rank's visitors at `rows`."""
        return _shifted(rows, self._start)

    def new_rows(self, fill: float) -> Tensor:  # (n,)
        """One value a stationary row, for a statistic."""
        return torch.full((self.num_rows,), fill, dtype=self.dtype, device=self.device)

    def new_columns(self, fill: float) -> Tensor:  # (N,)
        """One value a visiting row, for this rank's share of a statistic."""
        return torch.full((self.num_columns,), fill, dtype=self.dtype, device=self.device)

    def new_values(self, count: int) -> Tensor:  # (count,)
        """Room for values of single pairs."""
        return self._empty(count)

    def gather(self, values: Tensor) -> Tensor:  # (n, ...) -> (N, ...)
        """Facts about this rank's visitors, such as labels, from every rank."""
        return gather_rows(values, self._counts, self._group)

    def merge_columns(
        self,
        share: Tensor,  # (N, ...) over this rank's rows
        merge: Callable[[Tensor], Tensor],  # (W, n, ...) -> (n, ...)
    ) -> Tensor:  # (N, ...) over all rows
        """Complete a statistic of the columns over ranks; each owner merges, then all know."""
        if self.world_size == 1:
            return share
        return self.gather(merge(return_rows(share, self._counts, self._group)))

    def own(self, columns: Tensor) -> Tensor:  # (N, ...) -> (n, ...)
        """This rank's part of a complete statistic of the columns."""
        return columns[self._start : self._start + len(self._visitors)]

    def tiles(self) -> Iterator[Tile]:
        """Each pair once: one sweep of the visitors."""
        for visit in self._visiting.visits():
            yield from self._tiles_of(visit)

    def gradients(
        self,
        weights_of: Callable[[Tile], Tensor],  # (m, k) dL/dvalue; may reuse the tile's memory
        *,
        rows: bool = True,
        visitors: bool = True,
    ) -> tuple[Tensor, Tensor]:  # (n, d), (n, d)
        """Sums of weights times visiting rows for this rank's rows, and the other way round.

        They are the gradients divided by the factor; 0 for a side not asked for. It is the last
        sweep: the kept tiles are given up.
        """
        row_sums, way = self._empty(*self.rows.shape).zero_(), self._visiting
        for visit in way.visits_with_gradients() if visitors else way.visits():
            for tile in self._tiles_of(visit):
                weights, here = weights_of(tile), _shifted(tile.columns, -visit.columns.start)
                if rows:
                    row_sums[tile.rows].addmm_(weights, tile.column_block)
                if visit.gradients is not None:
                    visit.gradients[here].addmm_(weights.T, tile.row_block)
        self._end_sweeps()
        return row_sums, way.gradients() if visitors else self._no_gradients()

    def sparse_gradients(
        self,
        rows: Tensor,  # (p,) int64 positions among this rank's rows
        columns: Tensor,  # (p,) int64 positions among all N visiting rows
        weights: Tensor,  # (p,) dL/dvalue of these pairs; of all others it is 0
        *,
        visitors: bool = True,
    ) -> tuple[Tensor, Tensor]:  # (n, d), (n, d)
        """As `gradients` where few pairs have a weight: O(p d), and no product of tiles.

        The stationary rows are read whole.
        """
        table, row_sums = self._read(slice(0, self.num_rows)), self._empty(*self.rows.shape).zero_()
        way = self._visiting
        for visit in way.visits_with_gradients() if visitors else way.visits():
            here = (columns >= visit.columns.start) & (columns < visit.columns.stop)
            for some in here.nonzero().squeeze(1).split(self._tile):
                at_row, at_column = rows[some], columns[some] - visit.columns.start
                by = weights[some].unsqueeze(1)
                row_sums.index_add_(0, at_row, visit.rows[at_column] * by)
                if visit.gradients is not None:
                    visit.gradients.index_add_(0, at_column, table[at_row] * by)
        self._end_sweeps()
        return row_sums, way.gradients() if visitors else self._no_gradients()

    def _end_sweeps(self) -> None:
        self._kept.clear()
        self._room = self._empty(0)

    def _no_gradients(self) -> Tensor:  # (n, d)
        return torch.zeros_like(self._visitors, dtype=self.dtype)

    def row_gradients(
        self,
        weights_of: Callable[[Tile], Tensor],  # (m, k) dL/dvalue; may reuse the tile's memory
    ) -> Iterator[tuple[slice, Tensor, Tensor]]:  # positions, (m, d) rows, (m, d) gradients
        """As the rows' side of `gradients`, a block of rows at a time; overwritten by the next.

        So rows can be updated where they lie, without memory for all their gradients. Visitors
        must be gathered: round a ring, no block would be complete before the end.
        """
        (visit,) = self._visiting.visits()
        for tile in self._tiles_of(visit):
            sums = self._buffer("sums", len(tile.row_block), self.rows.shape[1])
            if tile.columns.start == 0:
                sums.zero_()
            sums.addmm_(weights_of(tile), tile.column_block)
            if tile.columns.stop == self.num_columns:
                yield tile.rows, tile.row_block, sums

    def _tiles_of(self, visit: Visit) -> Iterator[Tile]:
        for first in range(0, self.num_rows, self._tile):
            rows = slice(first, min(first + self._tile, self.num_rows))
            row_block = self._read(rows)
            for start in range(visit.columns.start, visit.columns.stop, self._tile):
                columns = slice(start, min(start + self._tile, visit.columns.stop))
                block = visit.rows[_shifted(columns, -visit.columns.start)]
                yield Tile(
                    self._multiply(row_block, block, (first, start)),
                    rows,
                    columns,
                    self._start + first - start,
                    self._buffer("scratch", rows.stop - first, columns.stop - start),
                    row_block,
                    block,
                )

    def _multiply(self, rows: Tensor, block: Tensor, place: tuple[int, int]) -> Tensor:
        if place in self._kept:
            return self._kept[place]
        m, k = len(rows), len(block)
        if m * k > len(self._room):
            return self._multiply_into(self._buffer("values", m, k), rows, block)
        here, self._room = self._room[: m * k], self._room[m * k :]
        self._kept[place] = self._multiply_into(here.view(m, k), rows, block)
        return self._kept[place]

    def _multiply_into(self, out: Tensor, rows: Tensor, block: Tensor) -> Tensor:
        return torch.addmm(out, rows, block.T, beta=0, alpha=self._factor, out=out)

    def _buffer(self, name: str, m: int, k: int) -> Tensor:
        if name not in self._buffers:
            width = self.rows.shape[1] if name == "sums" else min(self._tile, self.num_columns)
            self._buffers[name] = self._empty(min(self._tile, self.num_rows) * width)
        return self._buffers[name][: m * k].view(m, k)

    def _empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.dtype, device=self.device)


def tile_side(device: torch.device) -> int:
    """Rows and columns of a tile."""
    return _TILE.get(device.type, _TILE_ELSEWHERE)


def elements_kept(num_rows: int, num_columns: int, dim: int) -> int:
    """Inner products that a rank keeps from the first sweep for the later ones."""
    most = max(int(_KEPT_OF_ROWS * (num_rows + num_columns) * dim), _KEPT_ELEMENTS)
    return min(most, num_rows * num_columns)


def _shifted(positions: slice, by: int) -> slice:
    return slice(positions.start + by, positions.stop + by)


def _longest(rows: Tensor) -> Tensor:  # (n, d) -> ()
    return torch.linalg.vector_norm(rows, dim=1).amax() if len(rows) else rows.new_zeros(())
