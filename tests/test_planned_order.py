"""The order of planned batches: segments of plans, each sample once an epoch, whoever reads."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tars import loader_of, rows_of, write_set

from data.config import DataConfig, NegativesConfig
from data.dataset import build_sample_set
from data.errors import DataError
from data.index import load_index
from data.negatives.columns import SampleColumns
from data.negatives.plan import BatchPlan, make_plan
from data.negatives.reshuffle import reshuffle_plan
from data.negatives.store import Snapshot
from data.order import Order, equal_batches
from data.planned_order import ENDLESS, PlannedOrder, Segment
from data.read import coalesce
from data.reading_report import measure_reading
from trainer.config import ConfigError
from trainer.planning.maker import PlanMaker, Request
from trainer.planning.schedule import Schedule

DATA = "ab" * 16


def planned_of(num_samples: int, folder: Path) -> PlannedOrder:
    order = PlannedOrder(Order([num_samples], seed=1, chunk=2, lanes=3, window=2), DATA)
    order.start(folder, [])
    return order


def maker_of(num_samples: int, batch: int, folder: Path) -> PlanMaker:
    return PlanMaker(folder, 5, batch, SampleColumns(DATA, num_samples), DATA)


def snapshot_of(num_samples: int, version: int = 0) -> Snapshot:
    rng = np.random.default_rng([num_samples, version])
    steps = rng.integers(-1, 9, num_samples)  # some are unseen
    return Snapshot.of(rng.normal(size=(num_samples, 4)), steps, DATA)


def decide_all(planned, maker, schedule, batch, knobs, end):
    """What the trainer does in strict mode: every plan of a schedule, in order."""
    batch_of = equal_batches(batch)
    if schedule.first:
        planned.append(Segment(0, schedule.first))
    for switch in schedule.switches:
        base = None
        if not switch.fresh:
            base = BatchPlan.load(planned.folder / planned.segments[-1].plan)
        request = Request(
            name=switch.name,
            version=switch.version,
            asked_step=switch.asked_step,
            ids=planned.rest(switch.start, batch_of),
            head=planned.head(switch.start, batch_of),
            knobs=knobs,
            base=base,
        )
        header = maker.make(request, snapshot_of(planned.num_samples, switch.version))
        assert maker.find(request) == header  # and what is there is found
        planned.append(
            Segment(switch.start, switch.stop, switch.name, header.sha256, 0, 0, switch.version)
        )
    if planned.end < end:
        planned.append(Segment(planned.end, ENDLESS))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_each_sample_once_an_epoch_and_none_twice_in_a_batch(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("plans")
    num = data.draw(st.integers(1, 70), "samples")
    batch = data.draw(st.integers(1, num), "batch")
    refresh = data.draw(
        st.sampled_from(["1 epochs", "2 epochs", "1 steps", "3 steps", "0.4 epochs"])
    )
    knobs = NegativesConfig(
        planner=data.draw(st.sampled_from(["tree", "tree", "random"])),
        cluster_size=data.draw(st.integers(1, 9), "cluster"),
        start_epoch=data.draw(st.integers(0, 2)),
        random_share=data.draw(st.sampled_from([0.0, 0.3, 1.0])),
        refresh=refresh,
    )
    epochs = 4
    steps = -(-epochs * num // batch)
    schedule = Schedule.build(knobs, batch_size=batch, num_samples=num, total_steps=steps)
    planned, maker = planned_of(num, folder), maker_of(num, batch, folder)
    decide_all(planned, maker, schedule, batch, knobs, steps * batch)
    seen, ids = planned.ids(np.arange(steps * batch), equal_batches(batch))
    assert (seen == np.arange(steps * batch) // num).all()
    for epoch in range(epochs):
        assert sorted(ids[epoch * num : (epoch + 1) * num]) == list(range(num))
    if num >= 3 * batch or not schedule.first:  # else the plain order cannot promise it
        for step in range(steps):
            rows = ids[step * batch : (step + 1) * batch]
            assert len(set(rows.tolist())) == batch, f"step {step} of {schedule}"
    for position in {0, num // 2, num, 3 * num // 2, len(ids) - 1}:  # any place, in any order
        some = np.array([position, len(ids) - 1 - position])
        parts = (*planned.between(position, position + 1), *planned.between(some[1], some[1] + 1))
        assert (planned.ids(some, equal_batches(batch), parts)[1] == ids[some]).all()
        epoch = position // num * num
        rest = planned.rest(position, equal_batches(batch))
        assert sorted([*rest, *ids[epoch:position]]) == list(range(num))


@settings(max_examples=200, deadline=None)
@given(
    num=st.integers(1, 500),
    batch=st.integers(1, 60),
    steps=st.integers(1, 120),
    start=st.integers(0, 4),
    refresh=st.sampled_from(["1 epochs", "3 epochs", "1 steps", "7 steps", "100 samples"]),
    lead=st.sampled_from(["1 steps", "5 steps", "0.1 epochs", "2 epochs"]),
)
def test_switches_follow_one_another_and_are_asked_for_in_time(
    num, batch, steps, start, refresh, lead
):
    knobs = NegativesConfig(refresh=refresh, lead=lead, start_epoch=start)
    schedule = Schedule.build(knobs, batch_size=batch, num_samples=num, total_steps=steps)
    position, step = schedule.first, 0
    for number, switch in enumerate(schedule.switches):
        assert switch.version == number and switch.start == position < switch.stop
        assert switch.start // num == (switch.stop - 1) // num == switch.epoch
        assert switch.start % num == 0 or switch.start % batch == 0
        assert step <= switch.asked_step <= switch.start // batch
        if number:  # the plan before is known when this one is asked for
            assert schedule.switches[number - 1].start // batch <= switch.asked_step
        position, step = switch.stop, switch.asked_step
    assert position >= steps * batch or not schedule.switches
    assert (
        Schedule.build(
            NegativesConfig(planner="random"), batch_size=batch, num_samples=num, total_steps=steps
        ).switches
        == ()
    )


@pytest.mark.parametrize("text", ["soon", "5 minutes", "0 epochs"])
def test_a_refresh_that_is_no_length_is_refused(text):
    with pytest.raises(ConfigError, match=r"negatives.refresh.*steps"):
        Schedule.build(NegativesConfig(refresh=text), batch_size=1, num_samples=9, total_steps=9)


def test_clusters_stay_together_when_they_are_shuffled():
    knobs = NegativesConfig(cluster_size=4)
    snapshot = Snapshot.of(np.random.default_rng(0).normal(size=(64, 4)), None, DATA)
    columns = SampleColumns(DATA, 64)
    plan = make_plan(
        snapshot, np.arange(64), knobs, seed=1, version=0, batch_size=16, columns=columns
    )
    again = reshuffle_plan(plan, np.arange(64), version=1, asked_step=3)
    assert not np.array_equal(again.order, plan.order)

    def clusters(one):
        return {frozenset(part.tolist()) for part in np.split(one.order, one.bounds[1:-1])}

    assert clusters(again) == clusters(plan) and len(clusters(plan)) == 16
    other = reshuffle_plan(plan, np.arange(64), version=1, asked_step=3, salt=9)
    assert not np.array_equal(again.order, other.order)
    some = np.arange(0, 64, 3)
    fewer = reshuffle_plan(plan, some, version=2, asked_step=3)
    assert sorted(fewer.order) == some.tolist()
    more = reshuffle_plan(fewer, np.arange(64), version=2, asked_step=3)
    assert sorted(more.order) == list(range(64)) and more.header.num_random == 64 - len(some)


@pytest.fixture
def one_plan(tmp_path):
    """A table of one segment, 60 samples in batches of 16, and its folder."""
    planned, maker = planned_of(60, tmp_path), maker_of(60, 16, tmp_path)
    knobs = NegativesConfig(start_epoch=0)
    schedule = Schedule.build(knobs, batch_size=16, num_samples=60, total_steps=3)
    decide_all(planned, maker, schedule, 16, knobs, 48)
    return planned, tmp_path / "plan-000000"


def test_a_table_that_does_not_fit_is_refused(one_plan):
    planned, folder = one_plan
    (segment,) = planned.segments

    def start(*segments, fingerprint=DATA):
        order = PlannedOrder(planned.order, fingerprint)
        order.start(folder.parent, segments)

    start(segment)
    with pytest.raises(DataError, match="does not begin at 60"):
        start(segment, Segment(61, 120))
    with pytest.raises(DataError, match="has 59 samples from place 1 on, and 60 are left"):
        start(segment._replace(offset=1))
    with pytest.raises(DataError, match="made from another data set"):
        start(segment, fingerprint="cd" * 16)
    with pytest.raises(DataError, match="plan-000000: holds the plan"):
        start(segment._replace(sha256="0" * 64))
    with pytest.raises(DataError, match=r"plan-000007: no plan.json"):
        start(segment._replace(plan="plan-000007"))
    with pytest.raises(ValueError, match="60 are decided"):
        planned.between(0, 61)


@pytest.mark.parametrize("name", ["order.npy", "bounds.npy", "plan.json"])
@pytest.mark.parametrize("damage", ["cut", "changed", "gone"])
def test_a_torn_plan_is_one_clear_error_and_made_anew_where_nothing_hangs_on_it(
    one_plan, name, damage
):
    planned, folder = one_plan
    maker = maker_of(60, 16, folder.parent)
    request = Request(
        "plan-000000", 0, 0, np.arange(60), planned.head(0, equal_batches(16)),
        NegativesConfig(start_epoch=0),
    )  # fmt: skip
    before = maker.find(request)
    assert before is not None
    path = folder / name
    content = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        middle = len(content) // 2
        changed = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        path.write_bytes(content[:-3] if damage == "cut" else changed)
    order = PlannedOrder(planned.order, DATA)
    with pytest.raises(DataError, match="plan-000000"):
        order.start(folder.parent, planned.segments)
    assert maker.find(request) is None
    assert maker.make(request, snapshot_of(60)) == before


def test_a_plan_of_other_steps_or_knobs_is_not_taken(one_plan):
    planned, folder = one_plan
    maker = maker_of(60, 16, folder.parent)
    head = planned.head(0, equal_batches(16))
    fits = Request("plan-000000", 0, 0, np.arange(60), head, NegativesConfig(start_epoch=0))
    assert maker.find(fits) is not None
    for other in (
        {"asked_step": 1}, {"version": 2}, {"knobs": NegativesConfig(cluster_size=8)},
        {"ids": np.arange(59)}, {"head": head._replace(places=3)},
    ):  # fmt: skip
        assert maker.find(Request(**{**vars(fits), **other})) is None


@pytest.fixture(scope="module")
def spec(tmp_path_factory):
    return write_set(tmp_path_factory.mktemp("set"), [13, 7, 20, 11], broken=(5, 30))


def start_planned(loader, folder: Path, upto: int):
    """Decide plans of the loader's set up to this epoch."""
    samples = loader._samples
    planned = samples.planned
    knobs = NegativesConfig(start_epoch=1, refresh="2 steps", cluster_size=3)
    schedule = Schedule.build(knobs, batch_size=17, num_samples=51, total_steps=9)
    maker = PlanMaker(folder, 5, 17, SampleColumns(samples.fingerprint, 51), samples.fingerprint)
    if not planned.segments or planned.end == ENDLESS:
        planned.start(folder, [Segment(0, schedule.first)])
    for switch in schedule.switches:
        if switch.start == planned.end and switch.epoch < upto:
            batch_of = equal_batches(17)
            request = Request(
                switch.name, switch.version, 0, planned.rest(switch.start, batch_of),
                planned.head(switch.start, batch_of), knobs,
            )  # fmt: skip
            rows = np.random.default_rng(switch.version).normal(size=(51, 4))
            header = maker.make(request, Snapshot.of(rows, None, samples.fingerprint))
            planned.append(Segment(switch.start, switch.stop, switch.name, header.sha256))


@pytest.mark.parametrize(("world", "workers"), [(1, 0), (2, 0), (3, 2), (1, 3)])
def test_batches_do_not_depend_on_ranks_workers_or_when_plans_are_known(
    spec, tmp_path, world, workers
):
    options = {"batch": 17, "batching": "planned", "max_bad_fraction": 1.0}
    plain = loader_of(spec, **options)
    start_planned(plain, tmp_path / "plans", 3)
    whole = [rows_of([batch]) for batch in plain.batches(0, 9)]
    assert all(len({row[1] for row in rows}) == 17 for rows in whole)  # substitutes too
    late = [
        loader_of(spec, rank=r, world=world, workers=workers, prefetch=2, **options)
        for r in range(world)
    ]
    for loader in late:
        start_planned(loader, tmp_path / "plans", 1)
    streams = [loader.batches(0, 9) for loader in late]
    for step in range(9):
        if step in (3, 6):  # an epoch of three batches ends, and nothing has been read beyond it
            for loader in late:
                start_planned(loader, tmp_path / "plans", step // 3 + 1)
        assert rows_of([next(stream) for stream in streams], world) == whole[step]
    for loader in late:
        loader.close()


def test_the_plain_order_is_the_planned_one_without_plans(spec):
    plain = [rows_of([b]) for b in loader_of(spec, batch=17, max_bad_fraction=1.0).batches(0, 7)]
    planned = loader_of(spec, batch=17, batching="planned", max_bad_fraction=1.0, read_ahead=0)
    assert [rows_of([batch]) for batch in planned.batches(0, 7)] == plain


def test_each_sample_is_read_ahead_once(spec, tmp_path, monkeypatch):
    asked: list[list[int]] = []
    loader = loader_of(
        spec, batch=17, batching="planned", max_bad_fraction=1.0, read_ahead=34, workers=0
    )
    start_planned(loader, tmp_path, 3)
    monkeypatch.setattr(
        "data.batch.SampleReader.will_need",
        lambda _, entries: asked.append([entry.id for entry in entries]),
    )
    ids = loader._samples.planned.ids(np.arange(9 * 17), equal_batches(17))[1]
    list(loader.batches(0, 9))
    flat = [number for window in asked for number in window]
    assert flat == ids[17 : 9 * 17].tolist() and max(map(len, asked)) == 3 * 17


def test_planned_batches_take_one_source(tmp_path):
    specs = [write_set(tmp_path / "a", [30]), write_set(tmp_path / "b", [30])]
    with pytest.raises(DataError, match="takes one source, not 2"):
        loader_of(specs, batch=8, weights=(1.0, 1.0), batching="planned")


def test_a_table_travels_as_json(one_plan):
    planned, folder = one_plan
    again = PlannedOrder(planned.order, DATA)
    again.start(folder.parent, [Segment(*row) for row in json.loads(json.dumps(planned.segments))])
    assert again.segments == planned.segments


def test_what_an_order_costs_to_read(tmp_path):
    pattern = write_set(tmp_path / "set", [40, 40, 40])
    index = load_index(pattern)
    config = DataConfig(shards=pattern)
    together, apart = (
        build_sample_set([index], config.model_copy(update=sizes), seed=0)
        for sizes in ({"chunk": 40, "lanes": 1, "window": 1}, {"chunk": 1})
    )
    cheap = measure_reading(together, config, 40, stop=120)
    dear = measure_reading(apart, config, 40, stop=120)
    assert cheap.num_batches == dear.num_batches == 3
    assert cheap.mean_shards <= 2 < dear.mean_shards <= dear.most_shards <= 3
    assert cheap.reads <= 2 / 40 and 1 < cheap.amplification < 20
    assert "reads a sample" in str(dear)
    spans = [("a", 0, 10), ("b", 0, 10), ("a", 60, 10), ("a", 12, 5), ("a", 3, 4)]
    assert list(coalesce(spans, lambda _: 2)) == [
        ("a", 0, 17, [0, 4, 3]),
        ("a", 60, 70, [2]),
        ("b", 0, 10, [1]),
    ]
