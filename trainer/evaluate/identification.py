"""1:N identification: whose image is this, of those enrolled, and is it anybody's?

Each enrolled identity is one template. A probe is mated when its identity is enrolled. Closed set:
does the mate rank high among the templates? Open set: a search raises an alarm when its best
template scores above a threshold, which few non-mated probes may do.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.distributed import ProcessGroup

from data.errors import DataError
from data.order import derive_key
from trainer.collectives import gather_counts, gather_rows
from trainer.evaluate.fetch import fetch_rows
from trainer.evaluate.nearest import nearest
from trainer.evaluate.roc import Roc, name_share
from trainer.evaluate.templates import Members, pool_templates

RANKS = (1, 5, 10)
TILE = 4096  # probes whose mates are looked at together
_NON_MATED = 17  # what the key is for

Int64s = NDArray[np.int64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class Roles:
    """Who enrols and who searches; equal on every rank."""

    gallery: Int64s  # (g,) sample ids
    gallery_identities: Int64s  # (g,)
    probes: Int64s  # (p,) sample ids, rising
    probe_identities: Int64s  # (p,)
    origin: str
    """The file or the rule, for errors."""


def first_enrols(
    ids: Int64s,  # (N,) sample ids of all ranks
    labels: Int64s,  # (N,) below 0: unknown, left out
    *,
    non_mated: float,
    seed: int,
) -> Roles:
    """Of each identity the image of lowest id enrols and the others search.

    A share `non_mated` of the identities, drawn by (seed, label), enrols nothing: all their images
    search in vain.
    """
    order = np.lexsort((ids, labels))
    order = order[labels[order] >= 0]
    ids, labels = ids[order], labels[order]
    draws = (derive_key(seed, _NON_MATED, labels) >> np.uint64(11)).astype(np.float64) * 2.0**-53
    is_first = np.diff(labels, prepend=-1) != 0
    enrols = is_first & (draws >= non_mated)
    by_id = np.argsort(ids[~enrols])
    return Roles(
        gallery=ids[enrols],
        gallery_identities=labels[enrols],
        probes=ids[~enrols][by_id],
        probe_identities=labels[~enrols][by_id],
        origin=f"eval.non_mated = {non_mated:g}",
    )


def identification(
    rows: Tensor,  # (n, d) unit rows, this rank's
    ids: Tensor,  # (n,) int64 unique over the ranks
    roles: Roles,
    group: ProcessGroup | None,
    *,
    fpirs: Sequence[float] = (1e-3, 1e-2, 1e-1),
) -> tuple[dict[str, float], Roc | None]:
    """Rank-k rates of mated probes, and misses at false alarm rates; equal on every rank.

    `identification_rank-k`: the mate is among the k nearest templates (of equal cosines the lower
    identity is first). `identification_FNIR@FPIR=x`: the share of mated probes whose mate scores
    too low for the lowest threshold at which at most a share x of the non-mated probes has any
    template above it, whatever the mate's rank; `identification_DIR@FPIR=x`: the mate is above it
    and first. An identity's template is the direction of the sum of its unit rows. Images that
    could not be read neither enrol nor search. The curve is that of FPIR and 1 - FNIR; None
    without non-mated probes. Raises DataError without mated ones. Collective.
    """
    if not len(roles.gallery):
        raise _nobody(roles.origin)
    identities, numbers = np.unique(roles.gallery_identities, return_inverse=True)
    members = Members.of(numbers, np.arange(len(numbers)), roles.gallery, len(identities))
    templates, enrolled = pool_templates(rows, ids, members, group)
    template_ids = torch.from_numpy(enrolled).to(rows.device)
    probes, mates = _own_probes(rows, ids, roles, identities)
    mate_cosines, is_mated = _cosines_with_mates(probes, mates, templates, template_ids, group)
    cosines, found = nearest(probes, templates, template_ids, max(RANKS), group)
    hits = found == torch.from_numpy(mates).to(rows.device)[:, None]
    columns = (mate_cosines, is_mated, cosines[:, :1].squeeze(1), _first_hit(hits))
    counts = gather_counts(len(probes), group, rows.device)
    scores, mated, best, place = (
        gather_rows(column, counts, group).cpu().numpy() for column in columns
    )
    mated = mated > 0
    return _figures(scores, mated, best, place, roles.origin, fpirs)


def _own_probes(
    rows: Tensor, ids: Tensor, roles: Roles, identities: Int64s
) -> tuple[Tensor, Int64s]:  # (p, d), (p,) number of the mate's template, -1: nobody's
    """This rank's samples that search."""
    own = ids.cpu().numpy()
    here = np.isin(own, roles.probes)
    identity = roles.probe_identities[np.searchsorted(roles.probes, own[here])]
    places = np.searchsorted(identities, identity).clip(max=len(identities) - 1)
    mates = np.where(identities[places] == identity, places, -1)
    return rows[torch.from_numpy(here).to(rows.device)], mates


def _cosines_with_mates(
    probes: Tensor,  # (p, d)
    mates: Int64s,  # (p,)
    templates: Tensor,
    template_ids: Tensor,
    group: ProcessGroup | None,
) -> tuple[Tensor, Tensor]:  # (p,) float32, (p,) uint8: 1 where the mate has a template
    wanted, places = np.unique(mates, return_inverse=True)
    fetched, found = fetch_rows(templates, template_ids, wanted, group)
    where = torch.from_numpy(places).to(probes.device)
    cosines = torch.cat(
        [
            (probe.double() * fetched[place].double()).sum(dim=1).float()
            for probe, place in zip(probes.split(TILE), where.split(TILE), strict=True)
        ]
    )
    return cosines, torch.from_numpy(found[places]).byte().to(probes.device)


def _first_hit(hits: Tensor) -> Tensor:  # (p, k) -> (p,) place of the mate, k: not among them
    none = hits.new_ones(len(hits), 1)
    return torch.cat([hits, none], dim=1).byte().argmax(dim=1)


def _figures(
    scores: NDArray[np.float32],  # (P,) with the mate; anything without one
    mated: Bools,  # (P,)
    best: NDArray[np.float32],  # (P,) with the nearest template
    place: Int64s,  # (P,) of the mate, from 0
    origin: str,
    fpirs: Sequence[float],
) -> tuple[dict[str, float], Roc | None]:
    num_mated = int(mated.sum())
    if not num_mated:
        raise _nobody(origin)
    numbers = {
        **{f"identification_rank-{k}": int((place[mated] < k).sum()) / num_mated for k in RANKS},
        "num_identification_mated": num_mated,
        "num_identification_non_mated": len(mated) - num_mated,
    }
    if num_mated == len(mated):
        return numbers, None
    judged = np.where(mated, scores, best)
    roc = Roc.of(judged, mated)
    first = Roc.of(np.where(mated & (place > 0), -np.inf, judged), mated)
    for fpir in fpirs:
        name, point = name_share(fpir), roc.tar_at_far(fpir)
        numbers[f"identification_FNIR@FPIR={name}"] = 1 - point.tar
        numbers[f"identification_DIR@FPIR={name}"] = first.tar_at_far(fpir).tar
        numbers[f"num_identification_alarms@FPIR={name}"] = point.num_impostors
    return numbers, roc


def _nobody(origin: str) -> DataError:
    return DataError(
        f"{origin}: no probe's identity is in the gallery, so there is nobody to find; enrol "
        "identities that have other images too"
    )
