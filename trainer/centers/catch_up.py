"""What a row missed while no gradient came: a linear map of its state, the same for all rows.

A step without a gradient is linear in (row, momentum), and its coefficients depend on the step's
learning rate alone. So one small product of matrices per age stands for every row that has missed
as many steps, under any learning-rate schedule.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

HORIZON = 8192
"""Most steps that a row may be behind; `due_rows` are brought up to date whether touched or not."""
NEIGHBOURS = 64
"""Rows that are due together: memory is read faster so."""
# Products below this are far under the rounding of what they would be added to; their own products
# would become denormal numbers, which a CPU is slow with.
_NEGLIGIBLE = 1e-30


class CatchUp:
    """Products of the last steps' maps, in float64.

    `factors[:, :, a]` (s, s) is the newest step's matrix times ... times that of a - 1 steps
    before: what a row goes through that has missed the last a steps. Entries of ages that no row
    can have yet mean nothing.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        eye = torch.eye(size, dtype=torch.float64, device=device)
        self.factors = eye[:, :, None].repeat(1, 1, HORIZON + 1)  # (s, s, ages)

    def advance(self, matrix: Sequence[Sequence[float]]) -> None:
        """A step has passed that moves a row without gradient by `matrix` (s, s)."""
        past = self.factors[:, :, :-1]
        for i, row in enumerate([_combine(coefficients, past) for coefficients in matrix]):
            self.factors[i, :, 1:] = row

    def apply(self, state: Sequence[Tensor], ages: Tensor, room: Tensor) -> None:
        """Bring rows of a tile, each `ages` (k,) steps behind, to the present, in place.

        `state` holds one (k, d) for each row of the matrix; `room` (k, d) is written over.
        """
        factors = self.factors[:, :, ages.long()].to(room.dtype)[..., None]  # (s, s, k, 1)
        if len(state) == 1:
            state[0].mul_(factors[0, 0])
            return
        rows, momentum = state
        torch.mul(momentum, factors[0, 1], out=room)
        momentum.mul_(factors[1, 1]).addcmul_(rows, factors[1, 0])
        rows.mul_(factors[0, 0]).add_(room)


def _combine(coefficients: Sequence[float], past: Tensor) -> Tensor:
    """(s) times (s, s, ages) -> (s, ages)."""
    total = past[0] * coefficients[0]
    for coefficient, factors in zip(coefficients[1:], past[1:], strict=True):
        total.add_(factors, alpha=coefficient)
    return F.hardshrink(total, _NEGLIGIBLE)


def due_rows(step: int, first_row: int, num_rows: int) -> Tensor:  # (k,) local rows
    """Rows that are brought up to date at this step: each once a `HORIZON`, neighbours at once.

    By global row, so that a row's history of rounding does not depend on the number of ranks.
    """
    first_group = first_row // NEIGHBOURS
    due = first_group + (step - first_group) % HORIZON
    groups = range(due * NEIGHBOURS, first_row + num_rows, HORIZON * NEIGHBOURS)
    rows = (
        torch.tensor(groups, dtype=torch.int64)[:, None] + torch.arange(NEIGHBOURS)
    ).flatten() - first_row
    return rows[(rows >= 0) & (rows < num_rows)]
