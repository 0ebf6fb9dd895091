"""Rows of the global batch that stand for all of it: the same ones, known to every rank."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from data.order import derive_key, permute
from trainer.collectives import gather_counts, gather_rows, sum_over_ranks

NUM_ROWS = 64  # of a global batch: a share is known to 0.06, a mean over some steps well
# Of class centers or label rows, over all ranks: so that work and memory are bounded.
MAX_COLUMNS = 1 << 13
MAX_NUMBERS = 1 << 22
_ROWS, _COLUMNS = 61, 62  # what a key is for
_HASH_BITS = 24


@dataclass(frozen=True)
class Sampled:
    """Sampled rows by rising position; equal on every rank."""

    vectors: Tensor
    """(s, d) float64."""
    bars: Tensor
    """(s,) float64 cosine that a negative should stay below; NaN: the positive's."""
    chosen: Tensor
    """(s,) their places among all N rows by position."""
    facts: dict[str, Tensor]
    """(N,) int64 each, of the whole global batch by rising position."""

    def fact(self, name: str) -> Tensor:  # (s,)
        """One fact of the sampled rows."""
        return self.facts[name][self.chosen]


def sample_rows(
    vectors: Tensor,  # (n, d) this rank's rows
    positions: Tensor,  # (n,) int64 places in the run's stream of samples
    facts: Mapping[str, Tensor],  # (n,) int64 each
    group: ProcessGroup | None,
    *,
    seed: int,
    step: int,
    bars: Tensor | None = None,  # (n,)
) -> Sampled:
    """NUM_ROWS rows of any ranks, or all there are, chosen by (seed, step). Collective.

    Sends O(N) integers and O(NUM_ROWS d) numbers.
    """
    device = vectors.device
    columns = {"position": positions, **facts}
    table = torch.stack([column.to(device, torch.int64) for column in columns.values()], dim=1)
    everyone = gather_rows(table, gather_counts(len(table), group, device), group)
    everyone = everyone[everyone[:, 0].argsort()]
    known = dict(zip(columns, everyone.T.contiguous(), strict=True))
    chosen = torch.from_numpy(choose(len(everyone), seed, step)).to(device)
    at, here = find(known["position"][chosen], positions.to(device))
    rows = torch.zeros(len(chosen), vectors.shape[1] + 1, dtype=torch.float64, device=device)
    if bars is None:
        bars = vectors.new_full((len(vectors),), torch.nan)
    own = torch.cat([vectors, bars.to(vectors).unsqueeze(1)], dim=1)[here]
    rows[at[here]] = own.double()
    rows = sum_over_ranks(rows, group)  # zeros elsewhere: exact
    return Sampled(rows[:, :-1], rows[:, -1], chosen, known)


def choose(total: int, seed: int, step: int) -> np.ndarray:  # (s,) int64
    """Distinct places among `total`, rising: a function of seed and step."""
    places = np.arange(min(NUM_ROWS, total), dtype=np.int64)
    return np.sort(permute(places, np.array([total], np.int64), derive_key(seed, _ROWS, step)))


def choose_columns(
    keys: Tensor,  # (m,) int64 rising, this rank's
    sure: Tensor,  # (p,) int64 keys that are taken in any case
    group: ProcessGroup | None,
    *,
    dim: int,  # numbers of a column
    seed: int,
    step: int,
) -> Tensor:  # (k,) places among the m, rising
    """All columns, or where they are too many a sample by a keyed hash of their keys. Collective.

    A sample is of about MAX_COLUMNS columns over all ranks, of fewer where they hold more than
    MAX_NUMBERS numbers. Multiply-shift hashing (Dietzfelbinger et al. 1997), where the keys are.
    """
    total = sum(gather_counts(len(keys), group, keys.device))
    most = min(MAX_COLUMNS, max(1, MAX_NUMBERS // dim))
    if total <= most:
        return torch.arange(len(keys), device=keys.device)
    if (keys.diff() <= 0).any():
        raise ValueError("keys of columns do not rise: sort them, each at most once")
    factor, shift = derive_key(seed, _COLUMNS, step, np.arange(2)).view(np.int64).tolist()
    hashed = (keys * (factor | 1)).add_(shift)
    hashed.bitwise_right_shift_(64 - _HASH_BITS).bitwise_and_((1 << _HASH_BITS) - 1)
    taken = hashed < most * (1 << _HASH_BITS) // total
    at, here = find(keys, sure)
    taken[at[here]] = True
    places: Tensor = taken.nonzero()[:, 0]
    return places


def find(keys: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:  # (w,) int64, (w,) bool
    """Where each wanted value stands among distinct, rising keys, and whether it does."""
    if len(keys) == 0:
        return torch.zeros_like(wanted), torch.zeros_like(wanted, dtype=torch.bool)
    at = torch.searchsorted(keys, wanted.contiguous()).clamp_(max=len(keys) - 1)
    return at, keys[at] == wanted
