"""Several images as one row: a template's embedding, pooled over its media (photos and videos)."""

from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torch.distributed import ProcessGroup

from trainer.collectives import count_ranks, own_rank
from trainer.evaluate.fetch import MAX_ROWS, fetch_rows, in_rounds

Int64s = NDArray[np.int64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class Members:
    """Which images make which template, sorted, so that sums have one order; equal on all ranks."""

    templates: Int64s  # (k,) rising, numbers in [0, num_templates)
    media: Int64s  # (k,) rising inside a template; images of one medium count as one
    samples: Int64s  # (k,) rising inside a medium
    num_templates: int

    @classmethod
    def of(cls, templates: Int64s, media: Int64s, samples: Int64s, num_templates: int) -> Self:
        """From columns in any order; an image twice in a medium counts twice."""
        order = np.lexsort((samples, media, templates))
        return cls(templates[order], media[order], samples[order], num_templates)


def pool_templates(
    rows: Tensor,  # (n, d) this rank's, as they are to be averaged
    ids: Tensor,  # (n,) int64 unique over the ranks
    members: Members,
    group: ProcessGroup | None,
    *,
    max_rows: int = MAX_ROWS,
) -> tuple[Tensor, Int64s]:  # (t, d) unit rows, (t,) their numbers: this rank's templates
    """Mean inside each medium, sum over media, length 1; images that are nowhere are left out.

    A template without any image is missing in the answer. Templates lie on the ranks in runs;
    memory is a visiting part, `max_rows` rows and this rank's templates. Sums run in float64 in
    one order, so that the rows are the same at any world size. Collective.
    """
    rank, world_size = own_rank(group), count_ranks(group)
    first, last = (r * members.num_templates // world_size for r in (rank, rank + 1))
    places = [rows.new_zeros(0, rows.shape[1])]
    numbers = [np.zeros(0, np.int64)]
    blocks = _cut(members, first, last, max_rows)
    for block in in_rounds(blocks, np.zeros(0, np.int64), group, rows.device):
        wanted, where = np.unique(members.samples[block], return_inverse=True)
        fetched, found = fetch_rows(rows, ids, wanted, group)
        kept = found[where]
        pooled, present = _pool(
            fetched,
            where[kept],
            members.templates[block][kept],
            members.media[block][kept],
        )
        places.append(pooled)
        numbers.append(present)
    return torch.cat(places), np.concatenate(numbers)


def _cut(members: Members, first: int, last: int, max_rows: int) -> list[Int64s]:
    """Places of whole templates in [first, last): at most `max_rows`, or a template's alone."""
    ends = np.searchsorted(members.templates, np.arange(first, last), side="right").tolist()
    start = int(np.searchsorted(members.templates, first))
    blocks, end = [], start
    for next_end in ends:
        if next_end - start > max_rows and end > start:
            blocks.append(np.arange(start, end))
            start = end
        end = next_end
    return [*blocks, np.arange(start, end)] if end > start else blocks


def _pool(
    rows: Tensor,  # (u, d)
    where: Int64s,  # (k,) row of each member
    templates: Int64s,  # (k,) rising
    media: Int64s,  # (k,) rising inside a template
) -> tuple[Tensor, Int64s]:
    present, template_of = np.unique(templates, return_inverse=True)
    new_medium = (np.diff(templates, prepend=-1) != 0) | (np.diff(media, prepend=-1) != 0)
    medium_of = np.cumsum(new_medium) - 1
    sizes = np.bincount(medium_of)
    means = _sum_by(rows[torch.from_numpy(where).to(rows.device)], medium_of, len(sizes))
    means /= torch.from_numpy(sizes).to(rows.device)[:, None]
    sums = _sum_by(means, template_of[new_medium], len(present))
    return F.normalize(sums, dim=1).float(), present


def _sum_by(rows: Tensor, numbers: Int64s, count: int) -> Tensor:  # (count, d) float64
    sums = rows.new_zeros((count, *rows.shape[1:]), dtype=torch.float64)
    return sums.index_add_(0, torch.from_numpy(numbers).to(rows.device), rows.double())
