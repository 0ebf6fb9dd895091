"""The k gallery rows of largest cosine for each query, over galleries that lie in parts on ranks.

The answer is the same at any world size, tile size and order of the parts: cosines are summed in
float64 and rounded to float32, and of equal cosines the lower id comes first. (A float32 product
differs in its last bits with the shape of the tile; a float64 one too, but by a part in 10^8 of
what would round to another float32.)
"""

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from trainer.collectives import gather_counts, own_rank, sum_over_ranks

MAX_ID = 2**32 - 1
NOBODY = torch.iinfo(torch.int64).min  # a key below every real one


def nearest(
    queries: Tensor,  # (n, d) this rank's
    gallery: Tensor,  # (m, d) this rank's part of the gallery
    gallery_ids: Tensor,  # (m,) int64 in [0, 2^32), unique over the ranks
    k: int,
    group: ProcessGroup | None,
    *,
    query_tile: int = 512,
    gallery_tile: int = 4096,
) -> tuple[Tensor, Tensor]:  # (n, k) float32 cosines, falling; (n, k) int64 ids
    """Top k of the whole gallery, k cut to its size; a NaN cosine ranks below all others.

    Memory is one tile and one visiting part; each part is sent once. Collective.
    """
    total = int(sum_over_ranks(torch.tensor(len(gallery), device=gallery.device), group))
    k = min(k, total)
    best = torch.full((len(queries), k), NOBODY, dtype=torch.int64, device=queries.device)
    for part, ids in visit_parts((gallery, gallery_ids), group):
        for start in range(0, len(part), gallery_tile):
            tile = part[start : start + gallery_tile].double()
            tile_ids = ids[start : start + gallery_tile]
            for first in range(0, len(queries), query_tile):
                rows = slice(first, first + query_tile)
                keys = sort_keys(queries[rows].double() @ tile.T, tile_ids)
                nearest_here = keys.topk(min(k, len(tile)), dim=1).values
                best[rows] = torch.cat([best[rows], nearest_here], dim=1).topk(k, dim=1).values
    return split_keys(best)


def visit_parts(
    rows: tuple[Tensor, ...],  # each (n, ...), equal n: this rank's part, perhaps none
    group: ProcessGroup | None,
) -> Iterator[tuple[Tensor, ...]]:
    """Every rank's part that is not empty, in rank order: memory holds two parts, never all.

    Collective: every rank must run the iterator to its end.
    """
    if group is None:
        yield from [rows] if len(rows[0]) else []
        return
    for rank, count in enumerate(gather_counts(len(rows[0]), group, rows[0].device)):
        if count == 0:
            continue
        part = tuple(
            row.contiguous() if rank == own_rank(group) else row.new_empty(count, *row.shape[1:])
            for row in rows
        )
        for row in part:
            dist.broadcast(row, group=group, group_src=rank)
        yield part


def visit_blocks(
    rows: tuple[Tensor, ...],  # each (n, ...), equal n: this rank's part, perhaps none
    group: ProcessGroup | None,
    most: int,
) -> Iterator[tuple[int, tuple[Tensor, ...]]]:
    """Every rank's part in blocks of at most `most` rows, each with its owner's rank.

    In rank order; memory holds a block beside the own part. Collective, to the iterator's end.
    """
    me = own_rank(group)
    for owner, count in enumerate(gather_counts(len(rows[0]), group, rows[0].device)):
        for start in range(0, count, most):
            here = slice(start, min(start + most, count))
            block = tuple(
                row[here].contiguous()
                if owner == me
                else row.new_empty(here.stop - start, *row.shape[1:])
                for row in rows
            )
            if group is not None:
                for row in block:
                    dist.broadcast(row, group=group, group_src=owner)
            yield owner, block


def sort_keys(
    cosines: Tensor,  # (n, m)
    ids: Tensor,  # (m,) int64 in [0, 2^32)
) -> Tensor:  # (n, m) int64, no two in a row equal
    """One integer that sorts by cosine, then by falling id: 32 bits of each.

    The bits of a float32 already sort as integers, but for negative numbers, whose other 31 bits
    are flipped. Adding 0.0 makes -0.0 equal to 0.0.
    """
    rounded = torch.nan_to_num(cosines.float() + 0.0, nan=-torch.inf, posinf=torch.inf)
    bits = rounded.view(torch.int32)
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()
    return (ordered << 32) | (MAX_ID - ids)


def split_keys(keys: Tensor) -> tuple[Tensor, Tensor]:  # float32 cosines, int64 ids
    """The cosine and the id that `sort_keys` put together."""
    ordered = (keys >> 32).int()
    bits = torch.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered)
    return bits.view(torch.float32), MAX_ID - (keys & MAX_ID)
