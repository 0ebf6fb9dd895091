"""Metrics of ranked labels and the exact search, against loops and sorting, at any world size."""

import math

import pytest
import torch
import torch.nn.functional as F
import xmc_oracles
from dealt_rows import DEALS
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import run_ranks

from data.errors import DataError
from trainer.evaluate.xmc_metrics import (
    NO_LABEL,
    Truth,
    find_hits,
    inverse_propensities,
    label_metrics,
)
from trainer.evaluate.xmc_search import Pairs, top_labels

KS = (1, 3, 5)


def truth_of(lists) -> Truth:
    """Label lists as a CSR matrix, each sorted and unique."""
    rows = [sorted(set(labels)) for labels in lists]
    offsets = torch.tensor([0, *(len(row) for row in rows)]).cumsum(dim=0)
    return Truth(offsets, torch.tensor([label for row in rows for label in row]).long())


def padded(lists, width) -> torch.Tensor:
    return torch.tensor(
        [[*labels[:width], *[NO_LABEL] * (width - len(labels))] for labels in lists],
        dtype=torch.int64,
    ).view(len(lists), width)


def made_up(num_queries, num_labels, width, seed):
    """Predictions of several lengths, labels with a long tail, some queries with none."""
    draw = torch.Generator().manual_seed(seed)

    def some(most):
        count = int(torch.randint(0, most + 1, (1,), generator=draw))
        near = torch.randn(num_labels, generator=draw) - torch.arange(num_labels) * 0.05
        return near.argsort(descending=True)[:count].tolist()

    return [some(width) for _ in range(num_queries)], [some(7) for _ in range(num_queries)]


# ---------------------------------------------------------------- propensities and metrics


@pytest.mark.parametrize(
    ("num_points", "a", "b", "expected"),
    [
        (294_805, 0.6, 2.6, (12.59, 8.41, 3.32, 1.40)),  # LF-AmazonTitles-131K
        (2_248_619, 0.6, 2.6, (14.63, 9.70, 3.73, 1.47)),  # LF-AmazonTitles-1.3M
        (1_813_391, 0.5, 0.4, (14.41, 7.83, 3.24, 1.50)),  # LF-Wikipedia-500K
    ],
)
def test_published_propensities(num_points, a, b, expected):
    q = inverse_propensities(torch.tensor([1, 5, 50, 1000]), num_points, a, b)
    assert [round(value, 2) for value in q.tolist()] == list(expected)
    naive = xmc_oracles.inverse_propensity(50, num_points, a, b)
    assert float(q[2]) == pytest.approx(naive, rel=1e-14)


def test_propensities_without_meaning_are_errors():
    with pytest.raises(DataError, match="at least 3 training points"):
        inverse_propensities(torch.ones(2), 2, 0.55, 1.5)
    with pytest.raises(DataError, match=r"label 1 has 0 training points.*raise B"):
        inverse_propensities(torch.tensor([3, 0]), 100, 0.5, 0.0)


def test_three_queries_by_hand():
    truth = truth_of([[0, 2], [1], [0, 1, 3]])
    found = torch.tensor([[2, 1, 0], [0, 3, 1], [3, 2, NO_LABEL]])
    q = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    numbers = label_metrics(found, truth, q, None, ks=(1, 3), recall_ks=(1, 3))
    log3, log4 = math.log2(3), math.log2(4)
    assert numbers["xmc_P@1"] == 2 / 3
    assert numbers["xmc_P@3"] == (2 + 1 + 1) / 9
    assert numbers["xmc_R@3"] == pytest.approx((1 + 1 + 1 / 3) / 3)
    assert numbers["xmc_PSP@1"] == (3 + 4) / (3 + 2 + 4)
    assert numbers["xmc_PSP@3"] == (3 + 1 + 2 + 4) / (3 + 1 + 2 + 4 + 2 + 1)
    norms = 1 + 1 / log3, 1.0, 1 + 1 / log3 + 1 / log4
    ndcg = (1 + 1 / log4) / norms[0] + 1 / log4 + 1 / norms[2]
    assert numbers["xmc_nDCG@3"] == pytest.approx(ndcg / 3)
    gains = (3 + 1 / log4) / norms[0] + 2 / log4 + 4 / norms[2]
    best = (3 + 1 / log3) / norms[0] + 2 + (4 + 2 / log3 + 1 / log4) / norms[2]
    assert numbers["xmc_PSnDCG@3"] == pytest.approx(gains / best)
    assert numbers["xmc_C@1"] == 2 / 4 and numbers["xmc_C@3"] == 4 / 4


@settings(max_examples=40, deadline=None)
@given(
    num_queries=st.integers(1, 12),
    num_labels=st.integers(1, 40),
    width=st.integers(1, 12),
    seed=st.integers(0, 10_000),
)
def test_metrics_equal_loops(num_queries, num_labels, width, seed):
    predicted, wanted = made_up(num_queries, num_labels, min(width, num_labels), seed)
    q = 1 + 10 * torch.rand(
        num_labels, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    found, truth = padded(predicted, width), truth_of(wanted)
    if not any(wanted):
        with pytest.raises(DataError, match=r"none of .* queries has a label"):
            label_metrics(found, truth, q, None)
        return
    numbers = label_metrics(found, truth, q, None, ks=KS, recall_ks=KS)
    for k in KS:
        expected = xmc_oracles.metrics(predicted, wanted, q.tolist(), k, num_labels)
        for name, value in expected.items():
            assert numbers[name] == pytest.approx(value, rel=1e-12, abs=1e-15), name
    assert numbers["num_xmc_queries"] == sum(map(bool, wanted))
    assert numbers["num_xmc_unlabelled"] == len(wanted) - sum(map(bool, wanted))
    assert numbers["num_xmc_unpredicted"] == len(predicted) - sum(map(bool, predicted))


def test_a_perfect_ranking_scores_one():
    q = torch.tensor([5.0, 1.0, 3.0, 2.0, 4.0], dtype=torch.float64)
    wanted = [[0, 1, 4], [2], [1, 3]]
    perfect = [sorted(labels, key=lambda label: -float(q[label])) for labels in wanted]
    numbers = label_metrics(padded(perfect, 5), truth_of(wanted), q, None)
    for name in ("PSP", "PSnDCG", "nDCG"):
        assert all(numbers[f"xmc_{name}@{k}"] == pytest.approx(1, abs=1e-15) for k in KS)
    assert numbers["xmc_R@5"] == numbers["xmc_R@100"] == 1
    assert numbers["xmc_P@5"] == pytest.approx(6 / 15), "what is not predicted is missed"


def test_a_label_outside_the_table_is_an_error():
    with pytest.raises(DataError, match="has label 7, and the label table has labels 0 to 2"):
        label_metrics(torch.tensor([[0]]), truth_of([[1, 7]]), torch.ones(3).double(), None)


def test_hits_are_membership():
    truth = truth_of([[2, 5], [], [0]])
    found = torch.tensor([[5, 0, 9], [5, 0, NO_LABEL], [NO_LABEL, 9, 0]])
    assert find_hits(found, truth).tolist() == [
        [True, False, False],
        [False, False, False],
        [False, False, True],
    ]


def _metrics(group, predicted, wanted, q, bounds):
    first, last = (round(share * len(wanted)) for share in bounds[group.rank() :][:2])
    found = padded(predicted[first:last], 9)
    return label_metrics(found, truth_of(wanted[first:last]), q, group)


@pytest.mark.parametrize("bounds", DEALS)
def test_metrics_are_the_same_at_any_world_size(bounds):
    predicted, wanted = made_up(37, 30, 9, 5)
    q = 1 + 10 * torch.rand(30, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    whole = label_metrics(padded(predicted, 9), truth_of(wanted), q, None)
    for numbers in run_ranks(len(bounds) - 1, _metrics, predicted, wanted, q, bounds):
        assert numbers == whole


# ---------------------------------------------------------------- exact search


def rows(count, dim, seed, *, unit=True):
    made = torch.randn(count, dim, generator=torch.Generator().manual_seed(seed))
    return F.normalize(made, dim=1) if unit else made


def searched(queries, labels, ids, k, **options) -> list[list[int]]:
    """Labels found, without the blanks; every blank is behind."""
    scores, found = top_labels(queries, labels, ids, k, None, **options)
    assert ((found == NO_LABEL) == scores.isneginf()).all()
    assert (scores[:, 1:] <= scores[:, :-1]).all()
    assert ((found[:, 1:] == NO_LABEL) | (found[:, :-1] != NO_LABEL)).all()
    return [[label for label in row if label >= 0] for row in found.tolist()]


@settings(max_examples=60, deadline=None)
@given(
    num_queries=st.integers(1, 9),
    num_labels=st.integers(1, 70),
    dim=st.integers(1, 5),
    k=st.integers(1, 12),
    tiles=st.sampled_from([(1, 1), (2, 3), (4, 16), (256, 4096)]),
    copies=st.integers(0, 30),
    scale=st.sampled_from([1e-20, 1.0, 1e6]),
    seed=st.integers(0, 10_000),
)
def test_search_is_a_stable_sort(num_queries, num_labels, dim, k, tiles, copies, scale, seed):
    queries, labels = rows(num_queries, dim, seed), rows(num_labels, dim, seed + 1, unit=False)
    labels[: min(copies, num_labels)] = labels[0].clone()  # ties
    labels *= scale
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randperm(3 * num_labels, generator=draw)[:num_labels]
    chosen = torch.rand(num_queries, num_labels, generator=draw) < 0.1
    where, column = chosen.nonzero().unbind(dim=1)
    hidden = Pairs(where, ids[column])
    expected = xmc_oracles.ranking(
        queries, labels, ids, set(zip(where.tolist(), ids[column].tolist(), strict=True))
    )
    found = searched(
        queries, labels, ids, k, left_out=hidden, query_tile=tiles[0], label_tile=tiles[1]
    )
    assert found == [line[:k] for line in expected]


def test_constant_embeddings_are_ranked_by_label():
    queries, labels = torch.ones(300, 4) / 2, torch.ones(900, 4) / 2
    ids = torch.randperm(900, generator=torch.Generator().manual_seed(0))
    found = searched(queries, labels, ids, 7, query_tile=64, label_tile=128)
    assert found == [list(range(7))] * 300


def test_rows_that_are_not_finite_neither_predict_nor_are_predicted():
    queries, labels = rows(5, 4, 0), rows(9, 4, 1)
    queries[2, 1], labels[3, 0], labels[4, 2] = torch.nan, torch.nan, torch.inf
    found = searched(queries, labels, torch.arange(9), 9)
    assert found == xmc_oracles.ranking(queries, labels, torch.arange(9))
    assert found[2] == [] and all(not {3, 4} & set(row) for row in found)
    assert all(len(row) == 7 for number, row in enumerate(found) if number != 2)


def test_a_hidden_pair_goes_and_its_neighbours_stay():
    queries, labels = rows(6, 4, 2), rows(20, 4, 3)
    every = searched(queries, labels, torch.arange(20), 20)
    hidden = Pairs(torch.tensor([0, 0, 4]), torch.tensor([every[0][0], every[0][5], 19]))
    left = searched(queries, labels, torch.arange(20), 20, left_out=hidden)
    for number, row in enumerate(every):
        gone = {(0, every[0][0]), (0, every[0][5]), (4, 19)}
        assert left[number] == [label for label in row if (number, label) not in gone]


def test_low_matmul_precision_changes_nothing():
    queries, labels = rows(40, 16, 4), rows(500, 16, 5)
    exact = top_labels(queries, labels, torch.arange(500), 10, None)
    try:
        torch.set_float32_matmul_precision("medium")
        again = top_labels(queries, labels, torch.arange(500), 10, None, label_tile=64)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert torch.equal(exact[0], again[0]) and torch.equal(exact[1], again[1])


def _search(group, queries, labels, ids, pairs, bounds, label_bounds):
    rank = group.rank()
    first, last = (round(share * len(queries)) for share in bounds[rank : rank + 2])
    start, stop = (round(share * len(labels)) for share in label_bounds[rank : rank + 2])
    here = (pairs.rows >= first) & (pairs.rows < last)
    hidden = Pairs(pairs.rows[here] - first, pairs.labels[here])
    return top_labels(
        queries[first:last],
        labels[start:stop],
        ids[start:stop],
        8,
        group,
        left_out=hidden,
        query_tile=5,
        label_tile=4,
    )


@pytest.mark.parametrize("bounds", DEALS[1:])
def test_search_is_the_same_at_any_world_size(bounds):
    queries, labels = rows(31, 6, 6), rows(170, 6, 7)
    labels[80:120] = labels[:40]
    ids = torch.arange(170).flip(0)
    pairs = Pairs(torch.arange(31), torch.arange(31) * 5)
    whole = top_labels(queries, labels, ids, 8, None, left_out=pairs)
    of_labels = [0, *bounds[1:-1][::-1], 1] if bounds[1] else [0, 0.2, 0.2, 1]
    parts = run_ranks(
        len(bounds) - 1, _search, queries, labels, ids, pairs, bounds, sorted(of_labels)
    )
    for place in (0, 1):
        assert torch.equal(torch.cat([part[place] for part in parts]), whole[place])


def test_no_query_and_no_label():
    assert top_labels(rows(0, 3, 0), rows(4, 3, 1), torch.arange(4), 2, None)[1].shape == (0, 2)
    assert top_labels(rows(3, 3, 0), rows(0, 3, 1), torch.arange(0), 2, None)[1].shape == (3, 0)
