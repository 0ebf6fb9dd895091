"""Embeddings by sample id: bit for bit back, torn rows unseen, other data and NaN refused."""

import json
import os
import signal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.errors import DataError
from data.negatives.store import (
    TORN,
    UNSEEN,
    EmbeddingStore,
    Snapshot,
    project,
    projection,
    unit_rows,
)


def filled(folder, num=50, dim=6, fingerprint="f", seed=0):
    store = EmbeddingStore.create(folder, num, dim, fingerprint=fingerprint)
    rows = np.random.default_rng(seed).standard_normal((num, dim)).astype(np.float32)
    store.write(np.arange(num), rows, 3)
    return store, rows


@settings(max_examples=30, deadline=None)
@given(num=st.integers(1, 60), dim=st.integers(1, 9), data=st.data())
def test_rows_are_what_was_written_last(num, dim, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("store")
    store = EmbeddingStore.create(folder, num, dim)
    want, steps = np.zeros((num, dim), np.float16), np.full(num, UNSEEN)
    rng = np.random.default_rng(data.draw(st.integers(0, 999)))
    for step in range(data.draw(st.integers(0, 4))):
        ids = rng.permutation(num)[: rng.integers(0, num + 1)]
        rows = rng.standard_normal((len(ids), dim)).astype(np.float32)
        store.write(ids, rows, step)
        want[ids], steps[ids] = rows, step
    seen = steps >= 0
    assert store.fill == pytest.approx(seen.mean())
    assert sorted(store.ages(9)) == sorted(9 - steps[seen])
    for again in (store, EmbeddingStore.open(folder, "", writable=False)):
        assert (again.steps == steps).all()
        got = again.read(slice(None))
        assert got.dtype == np.float32 and (got[seen] == want[seen].astype(np.float32)).all()
        ids = np.flatnonzero(seen)[::-1]
        assert (again.read(ids) == want[ids].astype(np.float32)).all()


def test_a_snapshot_stays_as_it_was(tmp_path):
    store, rows = filled(tmp_path / "store")
    snapshot = store.snapshot(tmp_path / "snap")
    store.write(np.arange(10), np.zeros((10, 6), np.float32), 7)
    again = Snapshot.load(tmp_path / "snap", "f")
    assert (again.rows == rows.astype(np.float16)).all() and (again.steps == 3).all()
    assert again.sha256 == snapshot.sha256 and again.fill == 1.0
    other = store.snapshot(tmp_path / "snap")  # replaced whole
    assert other.sha256 != snapshot.sha256 and (other.steps[:10] == 7).all()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_the_hash_is_of_the_content_alone(tmp_path):
    stores = [filled(tmp_path / name)[0] for name in "ab"]
    first, second = (store.snapshot(tmp_path / f"{i}") for i, store in enumerate(stores))
    assert first.sha256 == second.sha256


def test_parts_bring_back_the_same_store(tmp_path):
    store, _ = filled(tmp_path / "a")
    store.write(np.array([4]), np.ones((1, 6), np.float32), 9)
    other = EmbeddingStore.create(tmp_path / "b", 50, 6, fingerprint="f")
    for start, stop in ((0, 17), (17, 50)):
        other.restore(start, *store.part(start, stop))
    assert other.snapshot(tmp_path / "o").sha256 == store.snapshot(tmp_path / "s").sha256
    with pytest.raises(DataError, match="do not fit"):
        other.restore(40, *store.part(0, 17))
    other.forget()
    assert other.fill == 0


@pytest.mark.parametrize("damage", ["rows", "steps", "snapshot"])
def test_a_damaged_snapshot_is_refused(tmp_path, damage):
    filled(tmp_path / "store")[0].snapshot(tmp_path / "snap")
    (path,) = (tmp_path / "snap").glob(f"{damage}.*")
    data = bytearray(path.read_bytes())
    data[-20] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(DataError, match=r"not what was written|no snapshot"):
        Snapshot.load(tmp_path / "snap")
    path.write_bytes(bytes(data[: len(data) // 2]))
    with pytest.raises(DataError, match="incomplete or damaged"):
        Snapshot.load(tmp_path / "snap")


def test_other_data_is_refused(tmp_path):
    store, _ = filled(tmp_path / "store")
    store.snapshot(tmp_path / "snap")
    for opened in (EmbeddingStore.open, Snapshot.load):
        folder = tmp_path / ("store" if opened == EmbeddingStore.open else "snap")
        assert opened(folder, "f").fill == 1
        with pytest.raises(DataError, match="another data set"):
            opened(folder, "g")


def test_a_store_that_is_none_is_refused(tmp_path):
    with pytest.raises(DataError, match="no embedding store"):
        EmbeddingStore.open(tmp_path / "nowhere")
    with pytest.raises(DataError, match="holds nothing"):
        EmbeddingStore.create(tmp_path / "empty", 0, 4)
    filled(tmp_path / "store")
    with (tmp_path / "store" / "rows.f16").open("r+b") as file:
        file.truncate(100)
    with pytest.raises(DataError, match="damaged"):
        EmbeddingStore.open(tmp_path / "store")
    filled(tmp_path / "store")
    header = tmp_path / "store" / "store.json"
    header.write_text(json.dumps({**json.loads(header.read_text()), "format": 99}))
    with pytest.raises(DataError, match="format 99"):
        EmbeddingStore.open(tmp_path / "store")


def test_bad_rows_change_nothing(tmp_path):
    store, rows = filled(tmp_path / "store")
    before = store.snapshot(tmp_path / "before").sha256
    bad = rows[:4].copy()
    bad[1, 2], bad[3, 0] = np.nan, 1e9  # the second is infinite in float16
    with pytest.raises(DataError, match=r"2 embeddings are NaN.*samples 21, 23"):
        store.write(np.arange(20, 24), bad, 5)
    with pytest.raises(DataError, match="6 columns"):
        store.write(np.arange(4), np.ones((4, 7)), 5)
    with pytest.raises(DataError, match="of another data set"):
        store.write(np.array([50]), rows[:1], 5)
    assert store.snapshot(tmp_path / "after").sha256 == before


def test_a_row_cut_off_while_it_was_written_is_unseen(tmp_path):
    store, rows = filled(tmp_path / "store", num=4000)
    child = os.fork()
    if not child:  # writes the same rows again and again, in another process
        for _ in range(20_000):
            store.write(np.arange(4000), rows, 8)
        os._exit(0)
    while not (store.steps == TORN).any() and not os.waitpid(child, os.WNOHANG)[0]:
        pass
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    steps = EmbeddingStore.open(tmp_path / "store").steps
    torn = steps == TORN
    assert set(steps[~torn].tolist()) <= {3, 8}
    assert (store.read(np.flatnonzero(~torn)) == rows[~torn].astype(np.float16)).all()
    snapshot = store.snapshot(tmp_path / "snap")
    assert snapshot.fill == pytest.approx(1 - torn.mean())


def test_drift_is_one_minus_the_mean_cosine(tmp_path):
    store, rows = filled(tmp_path / "store")
    fresh = rows + np.random.default_rng(1).standard_normal(rows.shape).astype(np.float32)
    want = 1 - (unit_rows(fresh) * unit_rows(rows)).sum(1).mean()
    assert store.drift(np.arange(50), fresh) == pytest.approx(want, abs=1e-3)
    assert store.drift(np.arange(50), 3 * rows) == pytest.approx(0, abs=1e-3)
    assert np.isnan(EmbeddingStore.create(tmp_path / "new", 50, 6).drift(np.arange(50), rows))


def test_projection_keeps_neighbours_and_is_keyed():
    rng = np.random.default_rng(0)
    centers = rng.standard_normal((40, 512))
    rows = (np.repeat(centers, 5, axis=0) + 0.3 * rng.standard_normal((200, 512))).astype(
        np.float32
    )
    short = project(rows, 64, 7)
    assert short.shape == (200, 64)
    assert np.allclose(np.linalg.norm(short, axis=1), 1, atol=1e-5)
    cosines = short @ short.T - 2 * np.eye(200)
    assert (cosines.argmax(1) // 5 == np.arange(200) // 5).all()
    exact = unit_rows(rows) @ unit_rows(rows).T
    assert np.abs(short @ short.T - exact).max() < 6 / np.sqrt(64)
    matrix = projection(512, 64, 7)
    assert np.allclose(matrix.T @ matrix, np.eye(64), atol=1e-5)
    assert (project(rows, 64, 7) == short).all() and not np.allclose(project(rows, 64, 8), short)
    assert np.allclose(project(rows, 512, 7), unit_rows(rows)), "narrow enough: only normalised"
