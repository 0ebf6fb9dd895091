"""Rows by sample id from whichever rank has them, and the cosines of pairs of samples.

Embeddings stay on the ranks that made them. Who needs others' rows asks for at most `max_rows` at
once, and every rank's part comes by as often as the neediest rank asks.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.distributed import ProcessGroup

from trainer.collectives import count_ranks, gather_counts, gather_rows, own_rank
from trainer.evaluate.nearest import visit_parts

MAX_ROWS = 1 << 16  # others' rows held at once: 128 MiB at d = 512
PAIR_TILE = 1 << 12

Int64s = NDArray[np.int64]
Floats = NDArray[np.float32]
Bools = NDArray[np.bool_]


def fetch_rows(
    rows: Tensor,  # (n, d) this rank's
    ids: Tensor,  # (n,) int64 unique over the ranks
    wanted: Int64s,  # (k,) ids that this rank asks for, unique and rising
    group: ProcessGroup | None,
) -> tuple[Tensor, Bools]:  # (k, d) rows, zeros where nobody has one; (k,) found
    """Any rank's rows by id. Collective."""
    asked = torch.from_numpy(wanted).to(rows.device)
    found = torch.zeros(len(wanted), dtype=torch.bool, device=rows.device)
    fetched = rows.new_zeros((len(wanted), *rows.shape[1:]))
    for part, part_ids in visit_parts((rows, ids), group):
        places = torch.searchsorted(asked, part_ids).clamp(max=max(0, len(wanted) - 1))
        here = (asked[places] == part_ids).nonzero()[:, 0] if len(wanted) else places[:0]
        fetched[places[here]] = part[here]
        found[places[here]] = True
    return fetched, found.cpu().numpy()


def pair_cosines(
    rows: Tensor,  # (n, d) unit rows, this rank's
    ids: Tensor,  # (n,) int64 unique over the ranks
    pairs: Int64s,  # (P, 2) ids, equal on every rank
    group: ProcessGroup | None,
    *,
    max_rows: int = MAX_ROWS,
) -> tuple[Floats, Bools]:  # (P,) cosines, (P,) False where a row is nowhere
    """The cosine of every pair, on every rank; the same at any world size and `max_rows`.

    Each rank works on a run of pairs; memory is a visiting part, `max_rows` rows and the answer.
    Cosines are summed in float64 and rounded. Collective.
    """
    rank, world_size = own_rank(group), count_ranks(group)
    first, last = (r * len(pairs) // world_size for r in (rank, rank + 1))
    parts = [(torch.zeros(0, device=rows.device), torch.zeros(0, dtype=torch.bool))]
    blocks = _cut_pairs(pairs[first:last], max_rows)
    for block in in_rounds(blocks, pairs[:0], group, rows.device):
        wanted, places = np.unique(block, return_inverse=True)
        places = places.reshape(block.shape)
        fetched, found = fetch_rows(rows, ids, wanted, group)
        cosines = _dots(fetched, torch.from_numpy(places).to(rows.device))
        parts.append((cosines, torch.from_numpy(found[places].all(axis=1))))
    cosines, present = (torch.cat(column) for column in zip(*parts, strict=True))
    counts = gather_counts(len(cosines), group, rows.device)
    return (
        gather_rows(cosines, counts, group).cpu().numpy(),
        gather_rows(present.byte().to(rows.device), counts, group).cpu().numpy() > 0,
    )


def in_rounds(
    blocks: Sequence[Int64s], empty: Int64s, group: ProcessGroup | None, device: torch.device
) -> Iterator[Int64s]:
    """This rank's blocks of work, then empty ones until every rank has done its last."""
    most = max(gather_counts(len(blocks), group, device))
    yield from blocks
    yield from [empty] * (most - len(blocks))


def _cut_pairs(pairs: Int64s, max_rows: int) -> list[Int64s]:
    """Runs of pairs that name at most `max_rows` samples (or two)."""
    if len(np.unique(pairs)) <= max_rows:
        return [pairs]
    each = max(1, max_rows // 2)
    return [pairs[start : start + each] for start in range(0, len(pairs), each)]


def _dots(rows: Tensor, places: Tensor) -> Tensor:  # (k, d), (p, 2) -> (p,) float32
    products = [
        (rows[tile[:, 0]].double() * rows[tile[:, 1]].double()).sum(dim=1).float()
        for tile in places.split(PAIR_TILE)
    ]
    return torch.cat(products) if products else rows.new_zeros(0)
