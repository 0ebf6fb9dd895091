"""Rows that lie in parts on the ranks, gathered or visited without gradient; parts may be empty."""

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


def part_sizes(num_rows: int, device: torch.device, group: ProcessGroup | None) -> list[int]:
    """Rows of every rank's part, in rank order."""
    if group is None:
        return [num_rows]
    here = torch.tensor([num_rows], dtype=torch.int64, device=device)
    sizes = [torch.empty_like(here) for _ in range(group.size())]
    dist.all_gather(sizes, here, group=group)
    return [int(size) for size in sizes]


def visit_parts(
    rows: tuple[Tensor, ...],  # each (n, ...), equal n: this rank's part
    group: ProcessGroup | None,
) -> Iterator[tuple[Tensor, ...]]:
    """Every rank's part in rank order, one at a time, so that memory holds two parts, never all.

    Collective: every rank must run the iterator to its end.
    """
    if group is None:
        yield rows
        return
    for rank, size in enumerate(part_sizes(len(rows[0]), rows[0].device, group)):
        if size == 0:
            continue
        visitors = rows
        if rank != group.rank():
            visitors = tuple(row.new_empty((size, *row.shape[1:])) for row in rows)
        for visitor in visitors:
            dist.broadcast(visitor.contiguous(), group=group, group_src=rank)
        yield visitors


def gather_parts(
    rows: Tensor,  # (n, ...) this rank's part
    group: ProcessGroup | None,
) -> Tensor:  # (N, ...) all parts in rank order
    """All parts on every rank: for numbers and classes, not for whole embedding sets."""
    return torch.cat([part for (part,) in visit_parts((rows,), group)] or [rows])


def sum_over_ranks(values: Tensor, group: ProcessGroup | None) -> Tensor:
    """Elementwise sum of a tensor of equal shape on every rank."""
    total = values.clone()
    if group is not None:
        dist.all_reduce(total, group=group)
    return total
