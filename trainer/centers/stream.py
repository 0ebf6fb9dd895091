"""The two sweeps of a margin softmax over (sampled centers x global batch), a tile at a time.

The first sweep adds up, for each sample, the normaliser and the direction its embedding is pushed
to, `sum_j exp(logit_j) * w_j`, together (as online softmax does: Milakov and Gimelshein 2018, arXiv
1805.02867), so the embeddings' gradient costs no sweep of its own. The second recomputes the tiles
and hands back each block of centers' gradient when it is complete. No (samples x centers) matrix
and no copy of the centers exists: memory is O(N d) and a tile.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from trainer.centers.margins import Margined
from trainer.centers.optimizer import SparseOptimizer
from trainer.similarity.pairs import Pairs, Tile

SHORTEST = 1e-12  # a row or embedding shorter than this has no direction


class UnitRows:
    """Centers that take part in a step, as unit rows: read from their table when needed."""

    def __init__(
        self,
        optimizer: SparseOptimizer,
        rows: Tensor | slice,  # (m,) local rows of the table
        count: int,  # m
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.shape = (count, optimizer.dim)
        self.dtype, self.device = dtype, device
        self._optimizer, self._rows = optimizer, rows
        self.norms = torch.empty(0)
        """(m, 1) lengths of the rows read last."""

    def read(self, rows: slice) -> Tensor:  # (m, d)
        """Unit rows at these positions among those that take part."""
        return self._normalise(self._optimizer.rows(self.table_rows(rows)))

    def read_at(self, positions: Tensor) -> Tensor:  # (k,) -> (k, d)
        """Unit rows at any positions."""
        if isinstance(self._rows, slice):
            return self._normalise(self._optimizer.rows(positions + self._rows.start))
        return self._normalise(self._optimizer.rows(self._rows[positions]))

    def _normalise(self, raw: Tensor) -> Tensor:
        self.norms = torch.linalg.vector_norm(raw, dim=1, keepdim=True).clamp_(min=SHORTEST)
        return raw / self.norms

    def table_rows(self, rows: slice) -> Tensor | slice:
        """Where these positions lie in the table."""
        if isinstance(self._rows, slice):
            return slice(self._rows.start + rows.start, self._rows.start + rows.stop)
        return self._rows[rows]


class Places:
    """Where, in which tile, a sample meets the center of its own class."""

    def __init__(
        self,
        positions: np.ndarray,  # (N,) of the samples' classes among those here, -1: not here
        classes: int,  # of a tile
        samples: int,  # of a tile
        device: torch.device,
    ) -> None:
        columns = np.flatnonzero(positions >= 0)
        rows = positions[columns]
        self._classes, self._samples = classes, samples
        keys = np.stack([rows // classes, columns // samples])
        order = np.lexsort(keys[::-1])
        self._rows = torch.from_numpy(rows[order] % classes).to(device)
        self._columns = torch.from_numpy(columns[order]).to(device)
        tiles, starts = np.unique(keys[:, order], axis=1, return_index=True)
        ends = np.append(starts[1:], len(columns))[: len(starts)]
        self._spans = {
            (int(r), int(c)): slice(int(a), int(b))
            for (r, c), a, b in zip(tiles.T, starts, ends, strict=True)
        }

    def of(self, first_class: int, columns: slice) -> tuple[Tensor, Tensor, Tensor] | None:
        """Rows and columns in a tile, and the samples among all N; None where there are none."""
        span = self._spans.get((first_class // self._classes, columns.start // self._samples))
        if span is None:
            return None
        samples = self._columns[span]
        return self._rows[span], samples - columns.start, samples


@dataclass(frozen=True)
class Sweeps:
    """What both sweeps of one step read."""

    pairs: Pairs  # values are cosines
    margined: Margined
    places: Places
    log_weights: Tensor | None  # (m,) of the classes here; None: all stand for themselves
    scale: float
    normalised: bool
    subcenters: int

    def add_negatives(self) -> tuple[Tensor, Tensor, Tensor]:  # (N,), (N,), (N, d)
        """The first sweep, over the centers of this rank: shift, sum and direction.

        Normalised: sum_j exp(logit_j - shift) and sum_j exp(logit_j - shift) * slope_j * w_j over
        negatives; else sum_j logit_j and sum_j slope_j * w_j.
        """
        shifts = self.margined.logits.clone()
        sums = torch.zeros_like(shifts)
        directions = torch.zeros_like(self.pairs.visitors(), dtype=shifts.dtype)
        for tile in self.pairs.tiles():
            columns = tile.columns
            logits, slopes, best = self._logits(tile, target=-torch.inf)
            if self.normalised:
                top = torch.maximum(shifts[columns], logits.amax(0))
                fade = torch.exp(shifts[columns] - top)
                shifts[columns] = top
                logits = logits.sub_(top).exp_()
                sums[columns] = sums[columns] * fade + logits.sum(0)
                directions[columns] *= fade.unsqueeze(1)
                weights = logits.mul_(self.scale if slopes is None else slopes)
            else:
                logits.masked_fill_(logits == -torch.inf, 0.0)
                sums[columns] += logits.sum(0)
                weights = torch.full_like(logits, self.scale) if slopes is None else slopes
                self._overwrite_targets(weights, tile, 0.0)
            directions[columns].addmm_(self._spread(weights, best).T, tile.row_block)
        return shifts, sums, directions

    def row_gradients(
        self,
        logsumexps: Tensor,  # (N,) of all classes; unused without a normaliser
        target_weights: Tensor,  # (N,) dloss/dcosine of the own class
        share: float,  # of a sample in the loss: 1 / N
    ) -> Iterator[tuple[slice, Tensor, Tensor]]:  # positions, (m, d) unit rows, (m, d) gradients
        """The second sweep: gradients of the unit rows of this rank, a block at a time."""

        def weights_of(tile: Tile) -> Tensor:
            logits, slopes, best = self._logits(tile, target=-torch.inf)
            if self.normalised:
                weights = logits.sub_(logsumexps[tile.columns]).exp_()
                weights.mul_(self.scale if slopes is None else slopes)
            else:
                weights = torch.full_like(logits, self.scale) if slopes is None else slopes
            weights.mul_(share)
            self._overwrite_targets(weights, tile, target_weights * share)
            return self._spread(weights, best)

        return self.pairs.row_gradients(weights_of)

    def _logits(self, tile: Tile, target: float) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Logits and slopes of the tile's classes, and which sub-center counts."""
        values, best = tile.values, None
        if self.subcenters > 1:
            values, best = values.view(-1, self.subcenters, values.shape[1]).max(dim=1)
        slopes = self.margined.negatives(values, tile.columns)
        if self.log_weights is not None:
            classes = slice(tile.rows.start // self.subcenters, tile.rows.stop // self.subcenters)
            weights = self.log_weights[classes].unsqueeze(1)
            if self.normalised:
                values.add_(weights)
            else:
                values.mul_(weights.exp())
                slopes = weights.exp() * (self.scale if slopes is None else slopes)
                slopes = slopes.expand_as(values).contiguous()
        self._overwrite_targets(values, tile, target)
        return values, slopes, best

    def _overwrite_targets(self, table: Tensor, tile: Tile, by: float | Tensor) -> None:
        place = self.places.of(tile.rows.start // self.subcenters, tile.columns)
        if place is not None:
            rows, columns, samples = place
            table[rows, columns] = by[samples] if isinstance(by, Tensor) else by

    def _spread(self, weights: Tensor, best: Tensor | None) -> Tensor:
        """A class's weight belongs to the sub-center that counts."""
        if best is None:
            return weights
        spread = weights.new_zeros(weights.shape[0], self.subcenters, weights.shape[1])
        return spread.scatter_(1, best.unsqueeze(1), weights.unsqueeze(1)).flatten(0, 1)


def tile_of(device: torch.device, subcenters: int) -> int:
    """Rows of a tile: whole classes, about as many as the engine's own measured side."""
    side = 768 if device.type == "cpu" else 4096
    return math.ceil(side / subcenters) * subcenters
