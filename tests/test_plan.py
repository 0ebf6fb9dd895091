"""Plans: pure, exactly once, never torn on disk, refused for other data, and worth their while."""

import json
import os
import signal
import time
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.config import NegativesConfig
from data.errors import DataError
from data.negatives.columns import SampleColumns, load_columns, load_coordinates
from data.negatives.hardness import measure_hardness
from data.negatives.plan import (
    BatchPlan,
    Head,
    derived_seed,
    grown_cluster_size,
    load_header,
    make_plan,
)
from data.negatives.store import Snapshot, unit_rows
from data.negatives.tree import Work
from data.order import derive_key

PLANNERS = ["random", "tree", "greedy", "topics", "coordinates", "identities"]


def world(num, seed=0, unseen=0.1):
    """A snapshot and every column of `num` samples."""
    rng = np.random.default_rng(seed)
    steps = np.where(rng.random(num) < unseen, -1, 5)
    snapshot = Snapshot.of(rng.standard_normal((num, 6)), steps, "print")
    columns = SampleColumns(
        fingerprint="print",
        num_samples=num,
        labels=rng.integers(0, max(2, num // 8), num),
        captions=rng.integers(0, num, num),
        shards=np.arange(num) * 7 // num,
        coordinates=unit_rows(rng.standard_normal((num, 3)).astype(np.float32)),
    )
    return snapshot, columns


@settings(max_examples=150, deadline=None)
@given(
    num=st.integers(1, 300),
    part=st.floats(0.05, 1),
    batch=st.integers(1, 50),
    lead=st.integers(0, 49),
    planner=st.sampled_from(PLANNERS),
    size=st.sampled_from([1, 2, 4, 7, 32, 100]),
    share=st.sampled_from([0.0, 0.3, 1.0]),
    locality=st.sampled_from([0, 0, 2]),
    unique=st.sampled_from([(), ("label",), ("label", "caption")]),
    cold=st.booleans(),
)
def test_every_id_once_whatever_is_asked(
    num, part, batch, lead, planner, size, share, locality, unique, cold
):
    snapshot, columns = world(num)
    rng = np.random.default_rng(num)
    ids = rng.permutation(num)[: max(1, int(part * num))]
    head = Head(lead % batch, rng.permutation(num)[: batch - lead % batch])
    knobs = NegativesConfig(
        planner=planner, cluster_size=size, random_share=share, locality=locality, unique=unique,
        neighbours=5,
    )  # fmt: skip

    def plan_of(asked, work):
        return make_plan(
            None if cold else snapshot, asked, knobs, seed=3, version=1, batch_size=batch,
            head=head, columns=columns, work=work,
        )  # fmt: skip

    plan = plan_of(ids, Work())
    assert sorted(plan.order.tolist()) == sorted(ids.tolist())
    edges = plan.edges()
    assert edges[0] == 0 and edges[-1] == len(ids) and np.isin(edges, plan.bounds).all()
    assert set(np.diff(edges)[1:-1].tolist()) <= {batch}
    assert (np.diff(plan.bounds) > 0).all()
    header = plan.header
    assert header.num_samples == len(ids) and header.num_left_over < batch
    assert header.num_unseen == (len(ids) if cold else (snapshot.steps[ids] < 0).sum())
    again = plan_of(np.sort(ids), Work(2))
    assert (again.order == plan.order).all() and again.header == header


@pytest.mark.parametrize("planner", PLANNERS)
def test_what_a_batch_holds_already_is_avoided(planner):
    snapshot, columns = world(1600)
    held = np.arange(100, 130)
    knobs = NegativesConfig(planner=planner, unique=("label",) if planner == "tree" else ())
    plan = make_plan(
        snapshot, np.arange(1600), knobs, seed=0, version=0, batch_size=40,
        head=Head(10, held), columns=columns,
    )  # fmt: skip
    assert plan.header.lead == 10 and plan.header.num_broken == 0
    assert not np.isin(plan.order[:10], held).any()
    if knobs.unique:
        fresh = columns.labels[plan.order[:10]]
        assert not np.isin(fresh, columns.labels[held]).any() and len(np.unique(fresh)) == 10
    assert plan.edges()[:3].tolist() == [0, 10, 50]


def test_one_and_all_random_are_the_random_plan():
    snapshot, _ = world(500)

    def order(source=snapshot, **knobs):
        knobs = NegativesConfig(**knobs)
        return make_plan(source, np.arange(500), knobs, seed=4, version=2, batch_size=32).order

    random = order(planner="random")
    assert (order(cluster_size=1) == random).all()
    assert (order(random_share=1.0) == random).all()
    assert (order(None) == random).all()
    unseen = Snapshot.of(np.full((500, 6), np.nan), np.full(500, -1))
    assert (order(unseen) == random).all(), "rows that were never written are never looked at"


def test_random_plans_are_uniform():
    """Chi squared over which of 8 batches each of 64 samples falls into, over 800 versions."""
    counts = np.zeros((64, 8))
    knobs = NegativesConfig(planner="random")
    for version in range(800):
        order = make_plan(None, np.arange(64), knobs, seed=0, version=version, batch_size=8).order
        counts[order, np.arange(64) // 8] += 1
    chi = ((counts - 100) ** 2 / 100).sum()
    assert abs(chi - 448) < 5 * np.sqrt(2 * 448)


GOLDEN = [
    12, 15, 20, 6, 9, 17, 2, 18, 21, 3, 10, 11, 7, 13, 14, 16, 19, 22, 0, 1, 23, 4, 5, 8,
]  # fmt: skip


def test_the_order_is_golden():
    """Resumed runs of other versions rely on it; PLANNER_VERSION goes up when it changes."""
    rows = (derive_key(5, np.arange(72)) >> np.uint64(40)).reshape(24, 3) / 2.0**24 - 0.5
    knobs = NegativesConfig(cluster_size=3)
    plan = make_plan(Snapshot.of(rows), np.arange(24), knobs, seed=1, version=2, batch_size=12)
    assert plan.order.tolist() == GOLDEN
    assert plan.bounds.tolist() == list(range(0, 25, 3))


def test_versions_and_seeds_make_other_plans():
    snapshot, _ = world(500)
    knobs = NegativesConfig(cluster_size=4)
    plans = [
        make_plan(snapshot, np.arange(500), knobs, seed=seed, version=version, batch_size=32)
        for seed, version in ((0, 0), (0, 1), (1, 0))
    ]
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert (plans[one].order != plans[other].order).mean() > 0.9
    assert len({derived_seed(seed, version) for seed in range(9) for version in range(9)}) == 81


def test_unseen_rows_are_spread_over_the_batches():
    snapshot, _ = world(3200, unseen=0.25)
    knobs = NegativesConfig(cluster_size=4)
    plan = make_plan(snapshot, np.arange(3200), knobs, seed=0, version=0, batch_size=64)
    unseen = (snapshot.steps[plan.order.reshape(-1, 64)] < 0).sum(axis=1)
    assert unseen.sum() == plan.header.num_unseen and unseen.max() - unseen.min() <= 8


def test_cluster_size_doubles_at_its_epochs():
    knobs = NegativesConfig(cluster_size=2, grow_at=(3, 5))
    assert [grown_cluster_size(knobs, epoch) for epoch in range(7)] == [2, 2, 2, 4, 4, 8, 8]


def test_bad_requests_are_one_clear_error():
    snapshot, columns = world(50, unseen=0)
    knobs = NegativesConfig(cluster_size=4)

    def plan(source=snapshot, ids=range(50), columns=columns):
        return make_plan(
            source, np.array(ids, np.int64), knobs, seed=0, version=0, batch_size=8, columns=columns
        )

    with pytest.raises(DataError, match=r"no samples"):
        plan(ids=[])
    with pytest.raises(DataError, match=r"sample 7 is to be planned twice"):
        plan(ids=[3, 7, 9, 7])
    with pytest.raises(DataError, match=r"samples 3 to 50 .* has 50"):
        plan(ids=[3, 50])
    with pytest.raises(DataError, match=r"another data set"):
        plan(source=snapshot._replace(fingerprint="other"))
    with pytest.raises(DataError, match=r"snapshot of 40 samples for a data set of 50"):
        plan(source=Snapshot.of(np.ones((40, 3)), fingerprint="print"), ids=range(40))
    rows = snapshot.rows.copy()
    rows[[11, 30]] = np.nan
    with pytest.raises(DataError, match=r"2 embeddings are NaN.*11, 30"):
        plan(source=snapshot._replace(rows=rows))


def some_plan(version=1):
    snapshot, columns = world(300)
    return make_plan(
        snapshot, np.arange(300), NegativesConfig(cluster_size=8), seed=0, version=version,
        batch_size=32, asked_step=17, columns=columns,
    )  # fmt: skip


def test_a_saved_plan_comes_back(tmp_path):
    plan = some_plan()
    full = replace(
        plan,
        negatives=np.arange(600, dtype=np.int64).reshape(300, 2),
        row_weights=np.ones(300, np.float32),
    )
    for mine, name in ((plan, "a"), (full, "b")):
        saved = mine.save(tmp_path / name)
        again = BatchPlan.load(tmp_path / name, "print", saved.header.sha256)
        assert again.header == saved.header == load_header(tmp_path / name)
        assert (again.order == plan.order).all() and (again.bounds == plan.bounds).all()
        assert (again.negatives is None) == (mine.negatives is None)
    assert (again.negatives == full.negatives).all() and (again.row_weights == 1).all()
    assert again.header.asked_step == 17 and again.header.knobs["cluster_size"] == 8
    assert plan.save(tmp_path / "c").header.sha256 == plan.save(tmp_path / "d").header.sha256
    assert all(not path.name.startswith(".") for path in tmp_path.iterdir())


@pytest.mark.parametrize("name", ["order.npy", "bounds.npy", "plan.json"])
def test_a_damaged_plan_is_refused(tmp_path, name):
    some_plan().save(tmp_path / "plan")
    path = tmp_path / "plan" / name
    good = path.read_bytes()
    for damage in (good[:-9], good[:-9] + b"\x01" + good[-8:], None):
        path.unlink(missing_ok=True)
        if damage is not None:
            path.write_bytes(damage)
        with pytest.raises(DataError, match=r"incomplete or damaged"):
            BatchPlan.load(tmp_path / "plan")
    path.write_bytes(good)
    BatchPlan.load(tmp_path / "plan")


def test_other_plans_and_other_data_are_refused(tmp_path):
    saved = some_plan().save(tmp_path / "plan")
    with pytest.raises(DataError, match=r"made from another data set"):
        BatchPlan.load(tmp_path / "plan", "another")
    some_plan(version=2).save(tmp_path / "plan")
    with pytest.raises(DataError, match=r"the folder was overwritten"):
        BatchPlan.load(tmp_path / "plan", "print", saved.header.sha256)
    header = tmp_path / "plan" / "plan.json"
    text = json.loads(header.read_text())
    header.write_text(json.dumps({**text, "num_broken": 7}))
    with pytest.raises(DataError, match=r"not what was written"):
        load_header(tmp_path / "plan")


def test_a_kill_leaves_a_whole_plan_or_none(tmp_path):
    knobs = NegativesConfig(planner="random")
    ids = np.arange(200_000)
    plans = [make_plan(None, ids, knobs, seed=0, version=v, batch_size=64) for v in range(2)]
    for number in range(6):
        child = os.fork()
        if not child:
            for _ in range(500):
                for plan in plans:
                    plan.save(tmp_path / "plan")
            os._exit(0)
        time.sleep(0.05 + 0.02 * number)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        if (tmp_path / "plan").exists():
            assert len(BatchPlan.load(tmp_path / "plan").order) == 200_000
    plans[0].save(tmp_path / "plan")
    assert [path.name for path in tmp_path.iterdir()] == ["plan"], "drafts of the dead are gone"


def test_hardness_rises_with_the_cluster_size():
    """sampling.md 2.7 (c), and the share of mates is the plan's own work."""
    rng = np.random.default_rng(0)
    topics = unit_rows(rng.standard_normal((64, 16)).astype(np.float32))
    rows = topics[rng.integers(0, 64, 8192)] + 0.5 * rng.standard_normal((8192, 16))
    snapshot = Snapshot.of(unit_rows(rows.astype(np.float32)))
    found = []
    for size in (1, 4, 32, 128):
        knobs = NegativesConfig(cluster_size=size)
        plan = make_plan(snapshot, np.arange(8192), knobs, seed=0, version=0, batch_size=128)
        found.append(measure_hardness(plan, snapshot))
    assert all(a.hardest + 0.005 < b.hardest for a, b in pairwise(found))
    assert found[0].mate_share == 0 and found[1].mate_share > 0.2 and found[3].mate_share == 1


def test_hardness_by_hand():
    rows = np.array([[1, 0], [0.6, 0.8], [0, 1], [1, 0], [-1, 0], [1, 0]], np.float32)
    plan = make_plan(
        None, np.arange(6), NegativesConfig(planner="random"), seed=0, version=0, batch_size=6
    )
    labels, twins = np.array([0, 1, 2, 0, -1, -1]), np.array([7, -1, -1, -1, -1, 7])
    snapshot = Snapshot.of(rows, [0, 0, 0, 0, 0, -1])  # the last one is unseen
    got = measure_hardness(plan, snapshot, labels=labels, twins=twins)
    assert got.hardest == pytest.approx((0.6 + 0.8 + 0.8 + 0.6 + 0) / 5, abs=1e-3)
    assert got.twins == 0 and got.num_rows == 5 and got.mate_share == 0
    assert got.distinct_labels == pytest.approx(4 / 6) and np.isnan(got.shards)
    both = measure_hardness(plan, Snapshot.of(rows), twins=twins)
    assert both.twins == pytest.approx(2 / 6)


class Column:
    """What an Index offers to plans."""

    def __init__(self, keys, labels, captions):
        self.keys, self.counts = keys, np.array([len(keys)])
        self.columns = {"label": np.array(labels), "caption": np.array(captions)}

    def column(self, name):
        return self.columns[name]

    def iter_keys(self):
        yield pa.array(self.keys)


class Samples:
    fingerprint = "print"

    def __init__(self, *indexes):
        self.indexes = indexes


def test_columns_are_loaded_as_the_knobs_ask():
    samples = Samples(Column(["a", "b"], [3, -1], [0, 5]), Column(["c"], [7], [5]))
    none = load_columns(samples, NegativesConfig())
    assert none.num_samples == 3 and none.labels is None and none.captions is None
    some = load_columns(samples, NegativesConfig(unique=("label", "caption"), locality=1))
    assert some.labels.tolist() == [3, -1, 7] and some.captions.tolist() == [0, 5, 5]
    assert some.shards.tolist() == [0, 0, 1] and some.fingerprint == "print"
    bare = Samples(Column(["a"], [-1], [0]))
    with pytest.raises(DataError, match=r"no sample has an integer label"):
        load_columns(bare, NegativesConfig(planner="identities"))
    with pytest.raises(DataError, match=r"groups samples of one label each, and these have lists"):
        load_columns(samples, NegativesConfig(planner="identities"), has_lists=True)
    with pytest.raises(DataError, match=r"no sample has a caption"):
        load_columns(bare, NegativesConfig(unique=("caption",)))


def test_coordinates_on_the_globe_and_in_the_plane(tmp_path):
    samples = Samples(Column(["a", "b", "c", "d"], [0] * 4, [0] * 4))
    path = tmp_path / "places.parquet"
    places = {"key": ["c", "a", "b"], "lat": [0.0, 10.0, 89.9], "lon": [180.0, -179.0, 30.0]}
    pq.write_table(pa.table(places), path)
    points = load_coordinates(path, samples)
    assert np.isnan(points[3]).all() and np.allclose(np.linalg.norm(points[:3], axis=1), 1)
    angle = np.degrees(np.arccos(points[0] @ points[2]))
    assert angle == pytest.approx(10.05, abs=0.1), "across the date line"
    pq.write_table(pa.table({"key": ["a", "b", "c"], "x": [0, 1, 5], "y": [100.0, 0, 0]}), path)
    flat = load_coordinates(path, samples)[:3]
    assert (flat @ flat.T)[1].argsort().tolist() == [0, 2, 1], "nearest in the plane"
    pq.write_table(pa.table({"key": ["z"], "x": [0]}), path)
    with pytest.raises(DataError, match=r"none of its keys \(z"):
        load_coordinates(path, samples)
    pq.write_table(pa.table({"key": ["a"], "x": ["no number"]}), path)
    with pytest.raises(DataError, match=r"no numeric column"):
        load_coordinates(path, samples)
    with pytest.raises(DataError, match=r"no Parquet table with a column key"):
        load_coordinates(tmp_path / "nowhere", samples)


def test_margins_and_weights_come_by_key(tmp_path):
    samples = Samples(Column(["a", "b"], [0] * 2, [0] * 2), Column(["c", "d"], [0] * 2, [0] * 2))
    path = tmp_path / "teacher.parquet"

    def load(**column) -> SampleColumns:
        pq.write_table(pa.table({"key": ["c", "z", "a"], **column}), path)
        names = {"margins" if "margin" in column else "weights": str(path)}
        return load_columns(samples, NegativesConfig(planner="topics", **names))

    margins = load(margin=[0.5, 9.0, None]).margins
    assert np.array_equal(margins, np.float32([np.nan, np.nan, 0.5, np.nan]), equal_nan=True)
    assert load(margin=[1, 2, 3]).margins[2] == 1
    weights = load(weight=[4, 9, 0]).weights
    assert weights.tolist() == pytest.approx([0, 2 / 3, 8 / 3, 2 / 3]) and weights.dtype == "f4"
    for bad in ([-1.0, 0, 1], [None, 0, 1]):
        with pytest.raises(DataError, match=r"none below 0, and not all 0"):
            load(weight=bad)
    with pytest.raises(DataError, match="a margin is infinite"):
        load(margin=[np.inf, 0, 1])
    with pytest.raises(DataError, match=r"no column weight of numbers; its columns are key, w"):
        load(w=[1, 2, 3])
    with pytest.raises(
        DataError, match=r"no column weight of numbers; its columns are key, weight"
    ):
        load(weight=["a", "b", "c"])
    pq.write_table(pa.table({"key": ["y"], "weight": [1.0]}), path)
    with pytest.raises(DataError, match=r"none of its keys \(y"):
        load_columns(samples, NegativesConfig(weights=str(path)))
