"""The collectives on real gloo processes: ragged and empty rows, every dtype, gradients."""

import subprocess
import sys

import pytest
import torch
from ranks import run_ranks

from trainer.collectives import (
    RingShift,
    all_gather_rows,
    all_reduce_sum,
    count_ranks,
    gather_counts,
    gather_rows,
    own_rank,
    return_rows,
    sum_over_ranks,
)

COUNTS = {1: [3], 2: [0, 4], 3: [2, 2, 2], 4: [3, 0, 1, 2]}
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64)


def _rows(counts, rank, dtype):
    start = 10 * sum(counts[:rank])
    return (torch.arange(counts[rank] * 2).view(-1, 2) + start).to(dtype)


def _move(group, counts):
    rank, results = own_rank(group), {}
    for dtype in DTYPES:
        rows = _rows(counts, rank, dtype)
        gathered = gather_rows(rows, counts, group)
        shares = (gathered * (rank + 1)).to(dtype)
        results[str(dtype)] = gathered, return_rows(shares, counts, group)
    return gather_counts(counts[rank], group, torch.device("cpu")), results


@pytest.mark.parametrize("world_size", COUNTS)
def test_rows_reach_everyone_and_shares_come_home(world_size):
    counts = COUNTS[world_size]
    for rank, (seen, results) in enumerate(run_ranks(world_size, _move, counts)):
        assert seen == counts
        for dtype in DTYPES:
            gathered, home = results[str(dtype)]
            expected = torch.cat([_rows(counts, r, dtype) for r in range(world_size)])
            assert gathered.dtype == dtype and torch.equal(gathered, expected)
            own = _rows(counts, rank, dtype)
            assert home.shape == (world_size, *own.shape)
            for source in range(world_size):
                assert torch.equal(home[source], (own * (source + 1)).to(dtype))


def _differentiate(group, counts):
    rank = own_rank(group)
    rows = _rows(counts, rank, torch.float64).requires_grad_()
    gathered = all_gather_rows(rows, group)
    weights = torch.arange(gathered.numel(), dtype=torch.float64).view_as(gathered) ** (rank + 1)
    (gathered * weights).sum().backward()
    value = torch.tensor(2.0 + rank, dtype=torch.float64, requires_grad=True)
    total = all_reduce_sum(value, group)
    (total**2 * (rank + 1)).backward()
    untouched = torch.ones(2)
    sum_over_ranks(untouched, group)
    return rows.grad, total.detach(), value.grad, untouched


@pytest.mark.parametrize("world_size", COUNTS)
def test_gradients_are_summed_over_ranks(world_size):
    counts = COUNTS[world_size]
    results = run_ranks(world_size, _differentiate, counts)
    index = torch.arange(sum(counts) * 2, dtype=torch.float64).view(-1, 2)
    expected = sum(index ** (rank + 1) for rank in range(world_size))
    total = sum(2.0 + rank for rank in range(world_size))
    for rank, (gradient, seen, value_gradient, untouched) in enumerate(results):
        start = sum(counts[:rank])
        assert torch.equal(gradient, expected[start : start + counts[rank]])
        assert seen == total
        assert value_gradient == 2 * total * sum(range(1, world_size + 1))
        assert torch.equal(untouched, torch.ones(2))


def _go_round(group, counts, dtype):
    rank, world_size = own_rank(group), count_ranks(group)
    rows, seen = _rows(counts, rank, dtype), []
    for hop in range(world_size):
        owner = (rank - hop) % world_size
        first = RingShift(rows, counts[owner - 1], group, tag=0)
        second = RingShift(-rows, counts[owner - 1], group, tag=1)
        negative = second.wait()
        rows = first.wait()
        seen.append((rows.clone(), negative))
    return seen


@pytest.mark.parametrize("world_size", [2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_ring_brings_every_ranks_rows_by_and_then_home(world_size, dtype):
    counts = COUNTS[world_size]
    for rank, seen in enumerate(run_ranks(world_size, _go_round, counts, dtype)):
        for hop, (rows, negative) in enumerate(seen):
            expected = _rows(counts, (rank - hop - 1) % world_size, dtype)
            assert torch.equal(rows, expected) and torch.equal(negative, -expected)


def test_one_process_needs_no_group():
    rows = torch.arange(6.0).view(3, 2).requires_grad_()
    gathered = all_gather_rows(rows, None)
    assert torch.equal(gathered, rows)
    (gathered * 3).sum().backward()
    assert torch.equal(rows.grad, torch.full((3, 2), 3.0))
    assert count_ranks(None) == 1 and own_rank(None) == 0
    assert torch.equal(all_reduce_sum(rows, None), rows)
    assert torch.equal(return_rows(rows, [3], None)[0], rows)


FRESH_RANK = """
import sys
import torch
import torch.distributed as dist
from trainer.losses import clip_loss

dist.init_process_group(
    "gloo", store=dist.FileStore(sys.argv[1], 2), rank=int(sys.argv[2]), world_size=2
)
rows = torch.randn(4, 3, requires_grad=True)
for visiting in ("gather", "ring"):
    clip_loss(rows, rows, torch.tensor(2.0), dist.group.WORLD, visiting=visiting).backward()
print([m for m in sys.modules if m in ("torch._dynamo", "sympy") or "functional_coll" in m])
"""


def test_the_compiler_is_not_imported(tmp_path):
    """It would cost seconds at the first step of every rank."""
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", FRESH_RANK, str(tmp_path / "store"), str(rank)],
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    assert [rank.communicate(timeout=120)[0] for rank in ranks] == ["[]\n", "[]\n"]
