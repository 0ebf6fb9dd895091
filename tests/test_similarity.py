"""The engine itself: each pair once, memory of a tile, columns over ranks, exclusion, ring."""

import math

import pytest
import torch
import torch.nn.functional as F
from ranks import run_ranks
from torch.utils._python_dispatch import TorchDispatchMode

from trainer.losses import clip_loss, multi_similarity_loss, siglip_loss, supcon_loss
from trainer.similarity.closed_form import attach_gradients, needs_gradient
from trainer.similarity.exclusion import Exclusion
from trainer.similarity.pairs import Pairs
from trainer.similarity.statistics import add_logsumexp


def _rows(count, dim=3, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(count, dim, generator=draw, dtype=torch.float64)


# ------------------------------------------------------------------------------------- tiles


@pytest.mark.parametrize("tile", [1, 4, 7, 100])
def test_each_pair_comes_once_a_sweep_with_its_place(tile):
    rows, visitors = _rows(10), _rows(10, seed=1)
    pairs = Pairs(rows, visitors, None, tile=tile)
    for _ in range(2):
        seen, own = torch.zeros(10, 10), torch.zeros(10, 10, dtype=torch.bool)
        for part in pairs.tiles():
            exact = rows[part.rows] @ visitors[part.columns].T
            assert torch.allclose(part.values, exact, rtol=0, atol=1e-14)
            assert part.scratch.shape == part.values.shape and max(part.values.shape) <= tile
            seen[part.rows, part.columns] += 1
            table = torch.zeros(part.values.shape, dtype=torch.bool)
            part.own_pairs(table).fill_(True)
            own[part.rows, part.columns] = table
        assert torch.equal(seen, torch.ones(10, 10))
        assert torch.equal(own, torch.eye(10, dtype=torch.bool))


def test_weights_become_gradients_of_both_sides():
    rows, visitors = _rows(11), _rows(11, seed=1)
    weights = _rows(11, 11, seed=2)
    pairs = Pairs(rows, visitors, None, tile=4)
    for ask in ({}, {"visitors": False}, {"rows": False}):
        for_rows, for_visitors = pairs.gradients(lambda t: weights[t.rows, t.columns], **ask)
        expected = weights @ visitors, weights.T @ rows
        for side, actual, exact in zip(
            ("rows", "visitors"), (for_rows, for_visitors), expected, strict=True
        ):
            assert torch.allclose(actual, exact if ask.get(side, True) else exact * 0, atol=1e-12)


class _Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation makes, and of all that are alive."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (tuple, list)) else [made]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // 4)
        return made


@pytest.mark.parametrize("loss", ["clip", "siglip", "supcon", "multi_similarity"])
def test_nothing_larger_than_the_rows_is_ever_made(loss, monkeypatch):
    monkeypatch.setattr("trainer.similarity.pairs._KEPT_ELEMENTS", 0)
    count, dim, tile = 1500, 8, 100
    rows = F.normalize(torch.randn(count, dim), dim=1).requires_grad_()
    labels, one = torch.arange(count) // 3, torch.tensor(5.0, requires_grad=True)
    ids = torch.arange(count) // 2
    with _Largest() as largest:
        {
            "clip": lambda: clip_loss(rows, rows, one, ids=ids, tile=tile, label_smoothing=0.1),
            "siglip": lambda: siglip_loss(rows, rows, one, one, ids=ids, tile=tile),
            "supcon": lambda: supcon_loss(rows, labels, one, ids=ids, tile=tile),
            "multi_similarity": lambda: multi_similarity_loss(rows, labels, ids=ids, tile=tile),
        }[loss]().backward()
    # The kept tiles are one block of three times the rows.
    assert largest.elements <= max(2 * tile**2, 3 * count * dim) < count**2 / 50


def test_kept_tiles_stay_linear_in_the_batch(monkeypatch):
    monkeypatch.setattr("trainer.similarity.pairs._KEPT_ELEMENTS", 0)
    dim = 4
    for count in (100, 400, 1600):
        pairs = Pairs(torch.randn(count, dim), torch.randn(count, dim), None, tile=10)
        kept = {part.values.data_ptr(): part.values for part in pairs.tiles()}
        distinct = sum(values.numel() for values in kept.values())
        assert distinct <= 3 * count * dim + 100  # and the one tile that is used again


def test_a_tile_far_larger_than_the_batch_costs_no_memory():
    with _Largest() as largest:
        rows = torch.randn(20, 4, requires_grad=True)
        clip_loss(rows, rows, torch.tensor(1.0), tile=10**9).backward()
    assert largest.elements <= 2 * 20 * 20


# -------------------------------------------------------------------------------- statistics


def test_logsumexp_of_nothing_of_one_and_of_extremes():
    total = torch.full((4,), -torch.inf)
    values = torch.tensor(
        [
            [-torch.inf, -torch.inf],
            [100.0, -torch.inf],
            [3e38, 3e38],
            [-1e30, -1e30],
        ]
    )
    add_logsumexp(total, values, 1, torch.empty_like(values))
    assert total[0] == -torch.inf and total[1] == 100 and total[2] == 3e38 and total[3] == -1e30
    add_logsumexp(total, values * 0, 1, torch.empty_like(values))  # 0 * inf is NaN, and stays one
    assert total[0].isnan() and total[2] == 3e38
    across = torch.zeros(3, dtype=torch.float64)
    add_logsumexp(across, torch.zeros(5, 3, dtype=torch.float64), 0, torch.empty(5, 3).double())
    assert torch.allclose(across, torch.full_like(across, math.log(6)), rtol=1e-15)


def _columns_of_a_rank(group, visiting):
    rank = torch.distributed.get_rank(group)
    counts = [3, 0, 4][: torch.distributed.get_world_size(group)]
    cut = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
    rows, visitors = _rows(7)[cut], _rows(7, seed=1)[cut]
    pairs = Pairs(rows, visitors, group, visiting=visiting, tile=2)
    sums, highest = pairs.new_columns(0.0), pairs.new_columns(-torch.inf)
    for tile in pairs.tiles():
        sums[tile.columns] += tile.values.sum(0)
        torch.maximum(highest[tile.columns], tile.values.amax(0), out=highest[tile.columns])
    sums = pairs.merge_columns(sums, lambda shares: shares.sum(0))
    highest = pairs.merge_columns(highest, lambda shares: shares.amax(0))
    return sums, highest, pairs.own(sums)


@pytest.mark.parametrize("visiting", ["gather", "ring"])
def test_columns_are_completed_over_ranks_by_any_merge(visiting):
    exact = _rows(7) @ _rows(7, seed=1).T
    results = run_ranks(3, _columns_of_a_rank, visiting)
    for sums, highest, _ in results:
        assert torch.allclose(sums, exact.sum(0), rtol=0, atol=1e-13)
        assert torch.equal(highest, exact.amax(0)) or torch.allclose(highest, exact.amax(0))
    assert torch.equal(torch.cat([own for _, _, own in results]), results[0][0])


def _pairs_held(group, visiting):
    """Rows in memory at once in a sweep with gradients."""
    rows = torch.ones(5, 2)
    pairs = Pairs(rows, rows, group, visiting=visiting, tile=2)
    return max(len(visit.rows) for visit in pairs._visiting.visits_with_gradients())


def test_a_ring_holds_one_ranks_rows_where_gathering_holds_all():
    assert run_ranks(3, _pairs_held, "ring") == [5, 5, 5]
    assert run_ranks(3, _pairs_held, "gather") == [15, 15, 15]


# --------------------------------------------------------------------------------- exclusion


def test_exclusion_takes_out_equal_identities_and_counts_the_rest():
    rows = _rows(6)
    ids = torch.tensor([1, 2, 1, 3, 4, 5])
    captions = torch.tensor([7, 8, 7, 8, 9, 10]) * 2**50
    exact = (ids[:, None] == ids) | (captions[:, None] == captions)
    exact.fill_diagonal_(False)
    for tile in (1, 2, 6):
        pairs = Pairs(rows, rows, None, tile=tile)
        exclusion = Exclusion(pairs, [ids, captions])
        excluded = torch.zeros(6, 6, dtype=torch.bool)
        for part in pairs.tiles():
            exclusion.exclude(part)
            excluded[part.rows, part.columns] = part.values == -torch.inf
        assert torch.equal(excluded, exact)
        assert torch.equal(exclusion.count_kept(), 6 - exact.sum(0))


def test_distinct_identities_cost_nothing():
    pairs = Pairs(_rows(6), _rows(6), None)
    exclusion = Exclusion(pairs, [torch.arange(6), None])
    assert not exclusion and exclusion.count_kept().tolist() == [6] * 6


# ------------------------------------------------------------------------------- closed form


def test_gradients_that_were_computed_with_the_value():
    x, y = torch.ones(2, 3, requires_grad=True), torch.ones(1)
    assert needs_gradient(x, y) == (True, False)
    with torch.no_grad():
        assert needs_gradient(x, y) == (False, False)
    value = attach_gradients(torch.tensor(7.0), (x, y), (torch.full((2, 3), 2.0), None))
    (3 * value).backward()
    assert value == 7 and torch.equal(x.grad, torch.full((2, 3), 6.0)) and y.grad is None


def test_a_second_derivative_is_refused_not_wrong():
    rows = torch.randn(4, 3, requires_grad=True)
    loss = clip_loss(F.normalize(rows), F.normalize(rows), torch.tensor(3.0))
    with pytest.raises(RuntimeError, match="first derivatives only"):
        torch.autograd.grad(loss, rows, create_graph=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here")
@pytest.mark.parametrize("tile", [None, 300])
def test_a_gpu_gives_the_same_answer(tile):
    rows = F.normalize(torch.randn(2, 1000, 64, dtype=torch.float64), dim=-1)
    ids = torch.arange(1000) // 2
    answers = []
    for device in ("cpu", "cuda"):
        images, texts = (x.to(device).requires_grad_() for x in rows)
        scale = torch.tensor(30.0, device=device, dtype=torch.float64, requires_grad=True)
        bias = torch.tensor(-9.0, device=device, dtype=torch.float64)
        value = clip_loss(images, texts, scale, ids=ids.to(device), tile=tile)
        value = value + siglip_loss(images, texts, scale, bias, tile=tile)
        value = value + supcon_loss(images, ids.to(device), scale, tile=tile)
        value = value + multi_similarity_loss(texts, ids.to(device), tile=tile)
        answers.append([value, *torch.autograd.grad(value, (images, texts, scale))])
    for on_cpu, on_gpu in zip(*answers, strict=True):
        assert torch.allclose(on_cpu, on_gpu.cpu(), rtol=0, atol=1e-10)
