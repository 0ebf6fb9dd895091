"""The 1:1 protocol of IJB-B and IJB-C: templates of photos and video frames, millions of pairs.

Maze et al. 2018, "IARPA Janus Benchmark - C". How an image counts is three switches, printed as
flags in every number's name: N1 keeps the length of its embedding (N0: length 1), D1 multiplies it
by the face detector's score, F1 adds the mirror image's embedding.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torch.distributed import ProcessGroup

from data.errors import DataError
from trainer.collectives import count_ranks, own_rank, sum_over_ranks
from trainer.evaluate.fetch import pair_cosines
from trainer.evaluate.roc import Roc, below_all, name_share, tar_numbers
from trainer.evaluate.templates import Members, pool_templates

INTERVAL = (0.025, 0.975)  # of the bootstrap

Int64s = NDArray[np.int64]
Floats = NDArray[np.floating]
Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class Protocol:
    """The tables of one set, with templates numbered from 0; equal on every rank."""

    members: Members
    scored: Int64s  # (k,) sample ids, rising
    scores: NDArray[np.float32]  # (k,) the detector's, of these samples; empty without a file
    pairs: Int64s  # (P, 2) template numbers
    same: Bools  # (P,)
    origin: str


@dataclass(frozen=True)
class Flags:
    """How an image counts in its template."""

    norm: bool
    score: bool
    flip: bool

    def __str__(self) -> str:
        return f"N{self.norm:d}D{self.score:d}F{self.flip:d}"


def ijb(
    rows: Tensor,  # (n, d) this rank's embeddings at their own length, flipped ones added
    ids: Tensor,  # (n,) int64 unique over the ranks
    protocol: Protocol,
    group: ProcessGroup | None,
    *,
    flags: Flags,  # stand in every number's name
    fars: Sequence[float],
    num_replicates: int = 0,
    seed: int = 0,
) -> tuple[dict[str, float], Roc]:
    """TAR at FAR of the templates' cosines, AUC and EER; equal on every rank.

    With `num_replicates`, `..._low` and `..._high` bound 95 % of the TARs of so many bootstrap
    replicates (`bootstrap_tars`). Pairs of a template of which no image could be read are left out
    and counted. Collective.
    """
    counted = _count_as(rows, ids, protocol, flags)
    templates, numbers = pool_templates(counted, ids, protocol.members, group)
    template_ids = torch.from_numpy(numbers).to(rows.device)
    cosines, present = pair_cosines(templates, template_ids, protocol.pairs, group)
    scored = Scored(cosines[present], protocol.same[present], protocol.pairs[present])
    if scored.same.all() or not scored.same.any():
        raise DataError(
            f"{protocol.origin}: {scored.same.sum()} of the {len(scored.same)} pairs with images "
            "are genuine: figures need both kinds"
        )
    roc = Roc.of(scored.cosines, scored.same)
    results = {
        f"ijb_{flags}_AUC": roc.auc(),
        f"ijb_{flags}_EER": roc.eer(),
        **tar_numbers(f"ijb_{flags}", roc, fars),
        "num_ijb_templates": protocol.members.num_templates,
        "num_ijb_genuine": len(roc.genuine),
        "num_ijb_impostors": len(roc.impostors),
        "num_ijb_left_out": int((~present).sum()),
    }
    if num_replicates:
        tars = bootstrap_tars(
            scored, group, rows.device, fars=fars, num_replicates=num_replicates, seed=seed
        )
        for far, column in zip(fars, tars.T if len(tars) else [], strict=False):
            low, high = np.quantile(column, INTERVAL).tolist()
            results[f"ijb_{flags}_TAR@FAR={name_share(far)}_low"] = low
            results[f"ijb_{flags}_TAR@FAR={name_share(far)}_high"] = high
        results["num_ijb_replicates"] = len(tars)
    return results, roc


def _count_as(rows: Tensor, ids: Tensor, protocol: Protocol, flags: Flags) -> Tensor:
    """Rows of length 1 or their own, times the detector's score."""
    counted = rows if flags.norm else F.normalize(rows, dim=1)
    if not flags.score:
        return counted
    own = ids.cpu().numpy()
    places = np.searchsorted(protocol.scored, own).clip(max=len(protocol.scored) - 1)
    scores = np.where(protocol.scored[places] == own, protocol.scores[places], 0)
    return counted * torch.from_numpy(scores.astype(np.float32)).to(rows.device)[:, None]


class Scored(NamedTuple):
    """Pairs of templates with their cosines."""

    cosines: Floats  # (P,)
    same: Bools  # (P,)
    pairs: Int64s  # (P, 2) template numbers


def bootstrap_tars(
    scored: Scored,
    group: ProcessGroup | None,
    device: torch.device,  # that the group sends from
    *,
    fars: Sequence[float],
    num_replicates: int,
    seed: int,
) -> Floats:  # (num_replicates or fewer, len(fars))
    """TAR at FAR when templates are drawn anew with replacement, a pair counting for both.

    Pairs share templates, so drawing pairs would find the interval too narrow; a pair's weight is
    the product of how often its two templates were drawn (the pigeonhole bootstrap, Owen 2007).
    Replicate r depends on (seed, r) alone; they are dealt to the ranks. One that leaves no genuine
    or no impostor pair is dropped. Collective.
    """
    rank, world_size = own_rank(group), count_ranks(group)
    used, numbers = np.unique(scored.pairs, return_inverse=True)
    compact = numbers.reshape(scored.pairs.shape).astype(np.int32)
    genuine, impostors = (
        _Kind.of(scored.cosines[kind], compact[kind]) for kind in (scored.same, ~scored.same)
    )
    tars = np.zeros((num_replicates, len(fars)))
    for replicate in range(rank, num_replicates, world_size):
        rng = np.random.Generator(np.random.Philox(key=[seed, replicate]))
        draws = rng.integers(0, len(used), len(used))
        times = np.bincount(draws, minlength=len(used))
        tars[replicate] = _weighted_tars(genuine, impostors, times, fars)
    tars = sum_over_ranks(torch.from_numpy(tars).to(device), group).cpu().numpy()
    return tars[~np.isnan(tars).any(axis=1)]


class _Kind(NamedTuple):
    """Pairs of one kind, the best first."""

    distances: Floats  # (K,) rising: negated cosines
    pairs: NDArray[np.int32]  # (K, 2)

    @classmethod
    def of(cls, cosines: Floats, pairs: NDArray[np.int32]) -> Self:
        distances = -below_all(cosines)
        order = np.argsort(distances, kind="stable")
        return cls(distances[order], pairs[order])

    def taken(self, times: Int64s) -> Int64s:  # (K,) weight of the pairs up to each
        return np.cumsum(times[self.pairs[:, 0]] * times[self.pairs[:, 1]])


def _weighted_tars(
    genuine: _Kind, impostors: _Kind, times: Int64s, fars: Sequence[float]
) -> list[float]:
    """`Roc.tar_at_far` with weights; NaN where a kind has none."""
    genuine_taken, impostors_taken = genuine.taken(times), impostors.taken(times)
    if not genuine_taken[-1] or not impostors_taken[-1]:
        return [np.nan] * len(fars)
    shares = impostors_taken / impostors_taken[-1]
    tars = []
    for far in fars:
        refused = int(np.searchsorted(shares, far, side="right"))
        accepted = len(genuine_taken)
        if refused < len(shares):
            bound = impostors.distances[refused]
            accepted = int(np.searchsorted(genuine.distances, bound, side="left"))
        tars.append(int(genuine_taken[accepted - 1]) / int(genuine_taken[-1]) if accepted else 0.0)
    return tars
