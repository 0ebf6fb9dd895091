"""The few collectives the trainer needs, over an explicit group; `group=None` is one process.

Rows are ragged: every rank may hold another number of them, also none. What must sum gradients is
an autograd function whose gradient is one sentence. Built on `torch.distributed` alone: its
functional collectives pull in the compiler, which costs seconds at every start.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.distributed import ProcessGroup


def count_ranks(group: ProcessGroup | None) -> int:
    """Number of processes in the group; 1 without one."""
    return 1 if group is None else dist.get_world_size(group)


def own_rank(group: ProcessGroup | None) -> int:
    """This process's rank in the group; 0 without one."""
    return 0 if group is None else dist.get_rank(group)


def gather_counts(count: int, group: ProcessGroup | None, device: torch.device) -> list[int]:
    """Every rank's `count`, in rank order."""
    if group is None or count_ranks(group) == 1:
        return [count]
    counts = torch.empty(count_ranks(group), dtype=torch.int64, device=device)
    dist.all_gather_into_tensor(counts, torch.tensor([count], device=device), group=group)
    return list(map(int, counts.tolist()))


def gather_rows(
    rows: Tensor,  # (n, ...) this rank's
    counts: Sequence[int],  # n of every rank
    group: ProcessGroup | None,
) -> Tensor:  # (N, ...) every rank's rows, in rank order
    """Every rank's rows, without gradient.

    Ragged rows travel padded to the longest, since gloo knows no other way; equal ones as they are.
    """
    if group is None or len(counts) == 1:
        return rows.detach()
    longest = max(counts)
    sent = rows.detach().contiguous()
    if len(sent) < longest:
        sent = torch.cat([sent, sent.new_zeros(longest - len(sent), *sent.shape[1:])])
    received = sent.new_empty(len(counts) * longest, *sent.shape[1:])
    dist.all_gather_into_tensor(received, sent, group=group)
    if min(counts) == longest:
        return received
    return torch.cat([part[:n] for part, n in zip(received.split(longest), counts, strict=True)])


def return_rows(
    parts: Tensor,  # (N, ...) this rank's share of something about every rank's rows
    counts: Sequence[int],  # n of every rank
    group: ProcessGroup | None,
) -> Tensor:  # (W, n, ...) every rank's share for this rank's rows, in rank order
    """Bring every rank's share home to the owner of the rows: the other half of a reduce-scatter.

    The bytes are a reduce-scatter's; that the owner does the reducing makes it exact in any dtype,
    the same in every run, and open to other merges than a sum.
    """
    if group is None or len(counts) == 1:
        return parts.unsqueeze(0)
    own = counts[own_rank(group)]
    home = parts.new_empty(len(counts) * own, *parts.shape[1:])
    dist.all_to_all_single(home, parts.contiguous(), [own] * len(counts), list(counts), group=group)
    return home.view(len(counts), own, *parts.shape[1:])


class _AllGatherRows(Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, counts: list[int], group: ProcessGroup | None) -> Tensor:
        ctx.counts, ctx.group = counts, group
        return gather_rows(rows, counts, group).clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return return_rows(gradient, ctx.counts, ctx.group).sum(0), None, None


def all_gather_rows(
    rows: Tensor,  # (n, ...) this rank's; n may differ from rank to rank
    group: ProcessGroup | None,
) -> Tensor:  # (N, ...) every rank's rows, in rank order
    """Every rank's rows; the backward pass sums the ranks' gradients of this rank's rows."""
    counts = gather_counts(len(rows), group, rows.device)
    gathered: Tensor = _AllGatherRows.apply(rows, counts, group)
    return gathered


class _AllReduceSum(Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, group: ProcessGroup | None) -> Tensor:
        ctx.group = group
        return sum_over_ranks(value, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return sum_over_ranks(gradient, ctx.group), None


def sum_over_ranks(value: Tensor, group: ProcessGroup | None) -> Tensor:
    """Sum of every rank's `value`, without gradient; `value` is left as it is."""
    total = value.detach().clone(memory_format=torch.contiguous_format)
    if group is not None:
        dist.all_reduce(total, group=group)
    return total


def max_over_ranks(value: Tensor, group: ProcessGroup | None) -> Tensor:
    """Elementwise largest of every rank's `value`, without gradient; `value` is left as it is."""
    largest = value.detach().clone(memory_format=torch.contiguous_format)
    if group is not None:
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    return largest


def all_reduce_sum(value: Tensor, group: ProcessGroup | None) -> Tensor:
    """Sum of every rank's `value`; the backward pass sums the ranks' gradients of that sum."""
    total: Tensor = _AllReduceSum.apply(value, group)
    return total


class RingShift:
    """A tensor on its way to the next rank while the one from the rank before comes in.

    Sending starts at once; `wait()` gives the tensor that arrived. Sender and receiver know the
    number of rows beforehand, so empty ones are not sent at all.
    """

    def __init__(
        self, rows: Tensor, num_arriving: int, group: ProcessGroup, *, tag: int = 0
    ) -> None:
        rank, world_size = own_rank(group), count_ranks(group)
        to, source = (
            dist.get_global_rank(group, (rank + step) % world_size) for step in (1, world_size - 1)
        )
        self._sent = rows.contiguous()  # held until sent
        self._arriving = rows.new_empty(num_arriving, *rows.shape[1:])
        moves = []
        if self._sent.numel():
            moves.append(dist.P2POp(dist.isend, self._sent, to, group, tag))
        if self._arriving.numel():
            moves.append(dist.P2POp(dist.irecv, self._arriving, source, group, tag))
        self._works = dist.batch_isend_irecv(moves) if moves else []

    def wait(self) -> Tensor:
        """The rows of the rank before, once they are here and ours have left."""
        for work in self._works:
            work.wait()
        return self._arriving
