"""Tables with one row a class, worked on a tile at a time; bfloat16 is rounded stochastically.

A table is far larger than a cache, and a step of an optimizer is a handful of operations on it. So
every operation runs on a tile that stays in the cache before the next tile is read: memory is read
and written once, and what is needed beside the tables is the size of a tile.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from trainer.centers.margins.draws import derive_keys

Ids = Tensor | slice
"""Rows of a table: distinct positions (k,), or a range with a start and a stop."""

# Bytes of one table's tile. An update holds up to four at a time in a core's cache of about 2 MiB
# (measured at d = 128 and 512); a GPU wants operations that outweigh their launch.
_TILE_BYTES = {"cpu": 2**19}
_TILE_BYTES_ELSEWHERE = 2**25
_LOW_HALF = 0xFFFF
_ROUNDING = 19  # what the key is for


def rows_per_tile(dim: int, dtype: torch.dtype, device: torch.device) -> int:
    """Rows of `dim` numbers in a tile; on a CPU each thread has a cache of its own."""
    size = _TILE_BYTES.get(device.type, _TILE_BYTES_ELSEWHERE)
    if device.type == "cpu":
        size *= torch.get_num_threads()
    return max(1, size // (dim * dtype.itemsize))


def tiles(ids: Ids, size: int) -> Iterator[tuple[Ids, slice]]:
    """(ids of a tile, their positions among all ids), at most `size` rows a tile."""
    start, stop = (ids.start, ids.stop) if isinstance(ids, slice) else (0, len(ids))
    for tile in range(start, stop, size):
        end = min(tile + size, stop)
        positions = slice(tile - start, end - start)
        yield (slice(tile, end) if isinstance(ids, slice) else ids[positions]), positions


class Scratch:
    """Buffers of one tile by name, made once: allocated by the tile they would cost more time."""

    def __init__(self, rows: int, dim: int, device: torch.device) -> None:
        self._shape, self._device = (rows, dim), device
        self._buffers: dict[str, Tensor] = {}

    def take(self, name: str, k: int, dtype: torch.dtype, *, pinned: bool = False) -> Tensor:
        """(k, d) of anything."""
        if name not in self._buffers:
            self._buffers[name] = torch.empty(
                self._shape, dtype=dtype, device=self._device, pin_memory=pinned
            )
        return self._buffers[name][:k]


class RoundingNoise:
    """Noise of stochastic rounding, a hash of (seed, step, stream, global row, column).

    It depends neither on how many ranks hold the rows, nor on tiles, nor on what was rounded before
    it. Noise of one row in two columns, of two rows, or of two steps is independent pair by pair.
    """

    def __init__(self, seed: int, dim: int, first_row: int, device: torch.device) -> None:
        self._seed, self._first_row = seed, first_row
        self._columns = _halves(derive_keys(torch.arange(dim, device=device)))[0].contiguous()
        self._newest: dict[int, tuple[int, Tensor]] = {}

    def keys(self, ids: Ids, step: int, stream: int) -> Tensor:
        """(k,) int64, one a row; `stream` tells apart uses in one step."""
        device = self._columns.device
        rows = torch.arange(ids.start, ids.stop, device=device) if isinstance(ids, slice) else ids
        if self._newest.get(stream, (None, None))[0] != step:
            key = derive_keys(self._seed, _ROUNDING, step, stream)
            self._newest[stream] = step, key.to(device)
        return derive_keys(self._newest[stream][1] + self._first_row + rows)

    def draw(self, keys: Tensor, room: Tensor) -> Tensor:
        """(k, d) int32 in [0, 2**16), written into room."""
        factor, offset = _halves(keys)
        # Multiply-shift hashing: the upper half of factor * column + offset, modulo 2**32.
        torch.mul(factor[:, None], self._columns, out=room).add_(offset[:, None])
        return room.bitwise_right_shift_(16).bitwise_and_(_LOW_HALF)


def _halves(keys: Tensor) -> tuple[Tensor, Tensor]:
    """The two halves of 64-bit keys (k,), as int32."""
    low, high = keys.view(torch.int32).view(-1, 2).unbind(1)
    return low, high


def round_stochastically(values: Tensor, noise: Tensor) -> Tensor:
    """Float32 values to one of their two bfloat16 neighbours, in place, the mean kept: (k, d).

    `noise` is int32, uniform in [0, 2**16): added to the bits that bfloat16 lacks, it carries into
    the others with a probability of what is cut off. A bfloat16 value stays what it is.
    """
    values.view(torch.int32).add_(noise).bitwise_and_(-1 - _LOW_HALF)
    return values


class Table:
    """(n, d) numbers, stored in `dtype` and worked on in float32 (float64 where stored so)."""

    def __init__(self, stored: Tensor, name: str, scratch: Scratch, noise: RoundingNoise) -> None:
        self.stored = stored
        self._name, self._scratch, self._noise = name, scratch, noise
        self._dtype = torch.float32 if stored.dtype == torch.bfloat16 else stored.dtype

    def read(self, ids: Ids) -> Tensor:
        """(k, d) to be worked on in place: of a range the table itself, else scratch."""
        direct = self.stored.dtype == self._dtype
        if isinstance(ids, slice):
            view = self.stored[ids]
            return view if direct else self._room(len(view)).copy_(view)
        if direct:
            return torch.index_select(self.stored, 0, ids, out=self._room(len(ids)))
        return self._room(len(ids)).copy_(self.stored.index_select(0, ids))

    def keys(self, ids: Ids, step: int, stream: int) -> Tensor | None:
        """What `write` needs of the same rows, (k,); made for many tiles at once, for speed."""
        rounded = self.stored.dtype != self._dtype
        return self._noise.keys(ids, step, stream) if rounded else None

    def write(self, ids: Ids, values: Tensor, keys: Tensor | None) -> None:
        """Store what `read` gave; `values` are used up."""
        if keys is None:
            if isinstance(ids, Tensor):
                self.stored.index_copy_(0, ids, values)
            return
        room = self._scratch.take("noise", len(values), torch.int32)
        round_stochastically(values, self._noise.draw(keys, room))
        if isinstance(ids, slice):
            self.stored[ids].copy_(values)
        else:
            self.stored.index_copy_(0, ids, values.to(self.stored.dtype))

    def _room(self, k: int) -> Tensor:
        return self._scratch.take(self._name, k, self._dtype)


def keep_in_bounds(rows: Tensor, bounds: tuple[float, float]) -> None:
    """Scale rows (k, d) whose length is outside of `bounds` back to it, in place.

    A row of length zero has no direction and stays zero.
    """
    if bounds == (0.0, math.inf):
        return
    lengths = torch.linalg.vector_norm(rows, dim=1)
    bounded = lengths.clamp(*bounds)
    if rows.device.type == "cpu" and bool((bounded == lengths).all()):
        return
    # Within the bounds the factor is exactly one.
    rows.mul_(torch.where(lengths > 0, bounded / lengths, 1.0)[:, None])
