"""Balanced 2-means: exact sizes for any input, one tree whatever the threads, tight clusters."""

import faiss
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import data.negatives.neighbours as neighbours_module
import data.negatives.tree as tree_module
from data.errors import DataError
from data.negatives.store import unit_rows
from data.negatives.tree import ITERATIONS, Work, balanced_clusters
from data.order import derive_key


def mixture(num, dim, centers, noise, seed=0):
    rng = np.random.default_rng(seed)
    means = rng.standard_normal((centers, dim))
    owner = rng.integers(0, centers, num)
    rows = means[owner] + noise * rng.standard_normal((num, dim))
    return unit_rows(rows.astype(np.float32)), owner


def oracle(rows, cluster_size, seed, ids):
    """The definition, one segment after the other, in plain float32 NumPy."""
    num = -(-len(ids) // cluster_size)
    sizes = [len(ids[i::num]) for i in range(num)]
    ends = np.concatenate([[0], np.cumsum(sizes)])

    def unit(x):
        length = np.linalg.norm(x)
        return x / length if length else x

    def split(members, level, first, last):
        if last - first == 1:
            return [members]
        middle = (first + last + 1) // 2
        left = int(ends[middle] - ends[first])
        key = int(derive_key(seed, 32, level, np.array([first]))[0])
        one = key % len(members)
        other = (one + 1 + (key >> 32) % (len(members) - 1)) % len(members)
        x = rows[members].astype(np.float64)
        direction = x[other] - x[one]
        for _ in range(ITERATIONS):
            near = np.sort(np.argsort(x @ direction, kind="stable")[:left])
            is_left = np.isin(np.arange(len(members)), near)
            direction = unit(x[~is_left].sum(0)) - unit(x[is_left].sum(0))
        parts = (members[is_left], first, middle), (members[~is_left], middle, last)
        return [leaf for part, a, b in parts for leaf in split(part, level + 1, a, b)]

    return split(np.asarray(ids), 0, 0, num)


@settings(max_examples=60, deadline=None)
@given(
    num=st.integers(1, 400),
    dim=st.integers(1, 5),
    size=st.integers(1, 60),
    seed=st.integers(0, 2**40),
    kind=st.sampled_from(["normal", "equal", "zero", "two"]),
)
def test_every_row_once_in_clusters_of_one_size(num, dim, size, seed, kind):
    rng = np.random.default_rng(seed)
    rows = {
        "normal": rng.standard_normal((num, dim)),
        "equal": np.ones((num, dim)),
        "zero": np.zeros((num, dim)),
        "two": np.sign(rng.standard_normal((num, 1))) * np.ones(dim),
    }[kind].astype(np.float16)
    clusters = balanced_clusters(rows, size, seed)
    sizes = np.diff(clusters.bounds)
    assert sorted(clusters.order.tolist()) == list(range(num))
    assert sizes.max() <= size and sizes.max() - sizes.min() <= 1
    assert len(sizes) == -(-num // size)
    if num % size == 0:
        assert (sizes == size).all()
    for first, last in zip(clusters.bounds[:-1], clusters.bounds[1:], strict=True):
        assert (np.diff(clusters.order[first:last]) > 0).all(), "ascending inside a cluster"


@pytest.mark.parametrize("num, size", [(64, 8), (97, 5), (200, 32), (7, 3)])
def test_equal_to_the_definition(num, size):
    rng = np.random.default_rng(num)
    rows = rng.standard_normal((num + 20, 6)).astype(np.float32)
    ids = np.sort(rng.permutation(num + 20)[:num])
    clusters = balanced_clusters(rows, size, 11, ids=ids)
    want = oracle(rows, size, 11, ids)
    got = np.split(clusters.order, clusters.bounds[1:-1])
    assert [g.tolist() for g in got] == [w.tolist() for w in want]


def test_large_segments_are_cut_exactly(monkeypatch):
    """Above CELL rows the centers come from a sample; nothing else changes."""
    monkeypatch.setattr(tree_module, "CELL", 1024)
    monkeypatch.setattr(tree_module, "SAMPLE", 256)
    rows, owner = mixture(3000, 8, 60, 0.2)
    one = balanced_clusters(rows, 10, 3)
    two = balanced_clusters(rows, 10, 3, work=Work(3))
    assert (one.order == two.order).all() and (np.diff(one.bounds) == 10).all()
    purity = [np.bincount(owner[c]).max() / 10 for c in np.split(one.order, one.bounds[1:-1])]
    assert np.mean(purity) > 0.75


def test_clusters_are_tight():
    rows, _ = mixture(4096, 16, 512, 0.25)
    clusters = balanced_clusters(rows, 8, 0)

    def length(order):
        return np.linalg.norm(rows[order].reshape(-1, 8, 16).mean(1), axis=1).mean()

    assert length(clusters.order) > 0.85 > 0.4 > length(np.arange(4096))


def test_seed_and_ids_are_all_that_counts():
    rows, _ = mixture(500, 4, 10, 0.5)
    first = balanced_clusters(rows, 7, 1)
    assert (first.order == balanced_clusters(rows.copy(), 7, 1).order).all()
    assert (first.order != balanced_clusters(rows, 7, 2).order).any()
    # Rows that are not asked for play no part.
    ids = np.arange(0, 500, 2)
    other = rows.copy()
    other[1::2] = np.nan
    mine = balanced_clusters(rows, 7, 1, ids=ids)
    assert (mine.order == balanced_clusters(other, 7, 1, ids=ids).order).all()
    assert (mine.order == ids[balanced_clusters(rows[::2], 7, 1).order]).all()


def test_a_hair_of_noise_moves_nothing():
    """sampling.md 11.5: naive splits share no cluster after 6e-8; canonical ones all."""
    rng = np.random.default_rng(0)
    rows, _ = mixture(4096, 16, 512, 0.25)
    noisy = (rows * (1 + 6e-8 * rng.standard_normal(rows.shape))).astype(np.float32)
    one, two = balanced_clusters(rows, 8, 0), balanced_clusters(noisy, 8, 0)
    same = (one.order.reshape(-1, 8) == two.order.reshape(-1, 8)).all(axis=1)
    assert same.mean() > 0.99


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_rows_that_are_no_numbers_are_named(value):
    rows, _ = mixture(100, 4, 10, 0.5)
    rows[17, 2] = rows[55, 0] = value
    with pytest.raises(DataError, match=r"2 embeddings are NaN or infinite.*17, 55"):
        balanced_clusters(rows, 8, 0)


def test_progress_counts_every_row():
    rows, _ = mixture(300, 4, 10, 0.5)
    told = []
    balanced_clusters(rows, 8, 0, work=Work(1, lambda done, total: told.append((done, total))))
    assert told[-1] == (300, 300)


def test_one_plan_at_any_number_of_threads(monkeypatch):
    """Threads of ours and of the libraries."""
    monkeypatch.setattr(tree_module, "CELL", 2048)
    monkeypatch.setattr(tree_module, "SAMPLE", 512)
    monkeypatch.setattr(neighbours_module, "EXACT", 1000)
    monkeypatch.setattr(neighbours_module, "CELL_ROWS", 1024)
    rows = np.random.default_rng(0).standard_normal((9000, 24)).astype(np.float16)
    found = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        faiss.omp_set_num_threads(threads)
        work = Work(threads)
        order = balanced_clusters(rows, 32, 5, work=work).order
        lists = neighbours_module.nearest(rows, np.arange(0, 9000, 3), 8, 3, work)
        found.append((order.tolist(), lists.tolist()))
    faiss.omp_set_num_threads(1)
    assert found[0] == found[1]
