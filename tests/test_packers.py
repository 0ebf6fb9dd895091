"""Clusters into batches, and what each planner promises of its batches."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import data.negatives.neighbours as neighbours_module
from data.config import NegativesConfig
from data.errors import DataError
from data.label_lists import LabelLists
from data.negatives.columns import SampleColumns
from data.negatives.constraints import Rules, keep_apart
from data.negatives.hardness import measure_hardness
from data.negatives.layout import BatchShape, Layout, lay_out, spread
from data.negatives.mining import attach, mine_negatives
from data.negatives.neighbours import choose_companions, nearest
from data.negatives.plan import make_plan
from data.negatives.reshuffle import reshuffle_plan
from data.negatives.store import Snapshot, unit_rows
from data.negatives.tree import ONE_THREAD, Clusters

ROWS = np.random.default_rng(0).standard_normal((3000, 12)).astype(np.float32)


def mixture(num, centers, noise=0.2, dim=12, seed=0):
    rng = np.random.default_rng(seed)
    owner = rng.integers(0, centers, num)
    rows = rng.standard_normal((centers, dim))[owner] + noise * rng.standard_normal((num, dim))
    return Snapshot.of(unit_rows(rows.astype(np.float32))), owner


def plan_of(snapshot, ids=None, *, batch_size=32, columns=None, seed=1, version=0, **knobs):
    ids = np.arange(len(snapshot.rows)) if ids is None else ids
    columns = columns or SampleColumns()
    config = NegativesConfig(**knobs)
    return make_plan(
        snapshot, ids, config, seed=seed, version=version, batch_size=batch_size, columns=columns
    )


def batches_of(plan):
    return np.split(plan.order, plan.edges()[1:-1])


def check_layout(layout, shape, members):
    assert sorted(layout.order.tolist()) == sorted(members)
    assert layout.bounds[0] == 0 and layout.bounds[-1] == len(layout.order)
    assert (np.diff(layout.bounds) > 0).all()
    assert np.isin(shape.edges(), layout.bounds).all(), "no run crosses the edge of a batch"


@settings(max_examples=150, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 9), max_size=40),
    one_size=st.booleans(),
    loose=st.integers(0, 40),
    batch=st.integers(1, 20),
    lead=st.integers(0, 19),
    seed=st.integers(0, 99),
)
def test_every_row_has_one_place(sizes, one_size, loose, batch, lead, seed):
    if one_size and sizes:
        sizes = [sizes[0]] * len(sizes)
    num = sum(sizes)
    if not num + loose:
        return
    clusters = Clusters(np.arange(num), np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64))
    shape = BatchShape(num + loose, batch, lead % batch)
    layout = lay_out(clusters, np.arange(num, num + loose), shape, seed)
    check_layout(layout, shape, range(num + loose))
    owner = np.repeat(np.arange(len(sizes) + loose), [*sizes, *[1] * loose])
    runs = np.split(owner[layout.order], layout.bounds[1:-1])
    assert all(len(set(run.tolist())) == 1 for run in runs), "a run is of one cluster"
    whole = sum(len(run) == [*sizes, *[1] * loose][run[0]] for run in runs)
    assert len(sizes) + loose - whole <= layout.torn
    if one_size and sizes:
        slots = int((np.diff(shape.edges()) // sizes[0]).sum())
        assert layout.torn == max(0, len(sizes) - slots), "as few as possible"


@pytest.mark.parametrize("batch, size, lead", [(64, 4, 0), (64, 32, 16), (60, 7, 0), (64, 64, 0)])
def test_clusters_are_torn_only_where_they_do_not_fit(batch, size, lead):
    num = 40 * batch // size * size
    clusters = Clusters(np.arange(num), np.arange(0, num + 1, size))
    layout = lay_out(clusters, np.zeros(0, np.int64), BatchShape(num, batch, lead), 3)
    torn = num // size - int((np.diff(BatchShape(num, batch, lead).edges()) // size).sum())
    assert layout.torn == max(0, torn)
    if batch % size == 0 and lead % size == 0:
        assert layout.torn == 0 and (np.diff(layout.bounds) == size).all()


def test_clusters_of_many_sizes_are_seldom_torn():
    rng = np.random.default_rng(0)
    sizes = rng.integers(1, 9, 2000)
    clusters = Clusters(np.arange(sizes.sum()), np.concatenate([[0], np.cumsum(sizes)]))
    shape = BatchShape(int(sizes.sum()), 64)
    assert lay_out(clusters, np.zeros(0, np.int64), shape, 0).torn < 10


def test_loose_rows_are_spread_evenly():
    clusters = Clusters(np.arange(3200), np.arange(0, 3201, 4))
    layout = lay_out(clusters, np.arange(3200, 6400), BatchShape(6400, 64), 5)
    loose = (layout.order.reshape(-1, 64) >= 3200).sum(axis=1)
    assert set(loose.tolist()) == {32}
    assert spread(10, np.array([0, 3, 6, 9])).sum() == 10


def test_larger_clusters_than_batches_are_cut_into_batches():
    snapshot, owner = mixture(1024, 4, 0.05)
    plan = plan_of(snapshot, cluster_size=256)
    assert np.mean([len(np.unique(owner[b])) for b in batches_of(plan)]) < 2.5


@settings(max_examples=60, deadline=None)
@given(
    num=st.integers(2, 200),
    batch=st.integers(1, 40),
    values=st.integers(1, 60),
    nothing=st.integers(0, 30),
    avoid=st.integers(0, 30),
    seed=st.integers(0, 99),
)
def test_the_like_are_kept_apart_wherever_they_can_be(num, batch, values, nothing, avoid, seed):
    rng = np.random.default_rng(seed)
    labels = np.where(rng.random(num) < nothing / 100, -1, rng.integers(0, values, num))
    lead = seed % batch
    shape = BatchShape(num, batch, lead)
    layout = Layout(rng.permutation(num), np.unique([0, *shape.edges(), num]), 0)
    held = rng.permutation(num)[:avoid]
    rules = Rules.of(("label",), SampleColumns(labels=labels), held)
    fixed, broken = keep_apart(layout, shape, rules, seed)
    check_layout(fixed, shape, range(num))
    likes = 0
    for number, ids in enumerate(np.split(fixed.order, shape.edges()[1:-1])):
        seen = set(labels[held].tolist()) - {-1} if lead and not number else set()
        for sample in ids.tolist():
            again = labels[sample] in seen or (lead and not number and sample in held)
            likes += bool(again)
            if labels[sample] >= 0:
                seen.add(labels[sample])
    assert likes == broken
    most = np.bincount(labels[labels >= 0], minlength=1).max()
    if not lead and most * 3 <= num // batch and nothing == 0:
        assert not broken, "plenty of batches for every value"


@settings(max_examples=60, deadline=None)
@given(
    num=st.integers(2, 150),
    batch=st.integers(1, 40),
    labels=st.integers(1, 200),
    most=st.integers(0, 4),
    avoid=st.integers(0, 30),
    seed=st.integers(0, 99),
)
def test_samples_that_share_any_label_are_kept_apart(num, batch, labels, most, avoid, seed):
    rng = np.random.default_rng(seed)
    rows = [set(rng.integers(0, labels, rng.integers(0, most + 1)).tolist()) for _ in range(num)]
    lead = seed % batch
    shape = BatchShape(num, batch, lead)
    layout = Layout(rng.permutation(num), np.unique([0, *shape.edges(), num]), 0)
    held = rng.permutation(num)[:avoid]
    rules = Rules.of(("label",), SampleColumns(lists=LabelLists.of_rows(map(list, rows))), held)

    def count(order) -> int:
        likes = 0
        for number, ids in enumerate(np.split(order, shape.edges()[1:-1])):
            first = bool(lead and not number)
            seen = set().union(*(rows[sample] for sample in held)) if first else set()
            for sample in ids.tolist():
                likes += bool(rows[sample] & seen or (first and sample in held))
                seen |= rows[sample]
        return likes

    fixed, broken = keep_apart(layout, shape, rules, seed)
    check_layout(fixed, shape, range(num))
    assert count(fixed.order) == broken
    if lead:  # a sample meets itself only where no other is left to take its place
        begun, rest = fixed.order[: min(lead, num)], fixed.order[min(lead, num) :]
        assert not np.isin(begun, held).any() or np.isin(rest, held).all()
    else:
        assert broken <= count(layout.order)
    met = np.bincount([label for row in rows for label in row], minlength=1).max()
    if not lead and num > 4 * batch * most * met:
        assert not broken, "plenty of batches for everyone"


@pytest.mark.parametrize("planner", ["tree", "greedy"])
def test_batches_without_a_shared_label_are_still_hard(planner):
    snapshot, _ = mixture(960, 40)
    kinds = np.random.default_rng(0).integers(0, 300, 960)
    rows = [[int(kind), 300 + i // 4] for i, kind in enumerate(kinds)]
    columns = SampleColumns(lists=LabelLists.of_rows(rows))
    plan = plan_of(snapshot, planner=planner, unique=("label",), columns=columns, batch_size=16)
    for ids in batches_of(plan):
        held = [label for sample in ids for label in rows[sample]]
        assert len(set(held)) == len(held)
    assert plan.header.num_broken == 0
    drawn = plan_of(snapshot, planner="random", unique=("label",), columns=columns, batch_size=16)
    hardness = [measure_hardness(p, snapshot, labels=kinds).hardest for p in (plan, drawn)]
    assert hardness[0] > hardness[1] + 0.1


def test_moved_rows_are_no_members_of_where_they_come_to():
    snapshot, _ = mixture(640, 40)
    labels = np.repeat(np.arange(80), 8)
    plan = plan_of(
        snapshot, cluster_size=8, unique=("label",), columns=SampleColumns(labels=labels)
    )
    assert plan.header.num_broken == 0
    assert all(len(np.unique(labels[ids])) == len(ids) for ids in batches_of(plan))
    free = plan_of(snapshot, cluster_size=8)
    clusters = {tuple(sorted(run)) for run in np.split(free.order, free.bounds[1:-1])}
    mine = [set(run.tolist()) for run in np.split(plan.order, plan.bounds[1:-1]) if len(run) > 1]
    assert all(any(run <= set(other) for other in clusters) for run in mine)


def test_captions_are_kept_apart_as_well():
    snapshot, _ = mixture(320, 40)
    columns = SampleColumns(
        labels=np.arange(320) % 50, captions=np.where(np.arange(320) % 3, np.arange(320) % 70, 0)
    )
    plan = plan_of(snapshot, unique=("label", "caption"), columns=columns, batch_size=16)
    for ids in batches_of(plan):
        texts = columns.captions[ids]
        assert len(np.unique(columns.labels[ids])) == len(ids)
        assert len(np.unique(texts[texts != 0])) == (texts != 0).sum()
    assert plan.header.num_broken == 0


@pytest.mark.parametrize("exact", [True, False])
def test_neighbours_are_the_nearest(exact, monkeypatch):
    rows = unit_rows(ROWS[:1500].copy())
    rows[7] = rows[3]  # equal cosines go by id
    ids = np.arange(0, 1500, 2)
    rows[ids[5]] = rows[ids[9]] = rows[ids[1]]
    if not exact:
        monkeypatch.setattr(neighbours_module, "EXACT", 100)
        monkeypatch.setattr(neighbours_module, "CELL_ROWS", 256)
    found = nearest(rows, ids, 6, 0, ONE_THREAD)
    cosines = rows[ids].astype(np.float64) @ rows[ids].T.astype(np.float64)
    np.fill_diagonal(cosines, -np.inf)
    want = np.argsort(-cosines, axis=1, kind="stable")[:, :6]
    recall = np.mean([len(set(a) & set(b)) / 6 for a, b in zip(found, want, strict=True)])
    assert recall > (0.999 if exact else 0.5)  # the last of equals may be another
    assert (found != np.arange(len(ids))[:, None]).all() and (found >= 0).all()
    assert all(len(set(row)) == 6 for row in found.tolist())
    ordered = np.take_along_axis(cosines, found.astype(np.int64), axis=1)
    assert (np.diff(ordered, axis=1) < 1e-6).all()
    assert found[1, :2].tolist() == [5, 9]


def test_fewer_rows_than_neighbours():
    found = nearest(ROWS, np.array([4]), 3, 0, ONE_THREAD)
    assert found.tolist() == [[-1, -1, -1]]
    found = nearest(ROWS, np.array([4, 9]), 3, 0, ONE_THREAD)
    assert found.tolist() == [[1, -1, -1], [0, -1, -1]]


def test_half_of_the_companions_are_the_nearest():
    lists = np.tile(np.arange(20, dtype=np.int32), (4000, 1))
    chosen = choose_companions(lists, 8, 3)
    assert (chosen[:, :4] == np.arange(4)).all()
    drawn = chosen[:, 4:]
    assert drawn.min() == 4 and all(len(set(row)) == 4 for row in drawn[:50].tolist())
    counts = np.bincount(drawn.reshape(-1), minlength=20)[4:]
    assert ((counts - 1000) ** 2 / 1000).sum() < 45, "uniform (chi squared, 15 degrees)"
    assert (choose_companions(lists[:, :6], 8, 3) == lists[:, :6]).all()


def test_greedy_batches_are_hard_and_skip_what_is_too_near():
    snapshot, owner = mixture(2000, 100)
    greedy = plan_of(snapshot, planner="greedy", neighbours=8)
    random = plan_of(snapshot, planner="random")
    hard, easy = (measure_hardness(p, snapshot, num_batches=99) for p in (greedy, random))
    assert hard.hardest > easy.hardest + 0.1 and hard.mate_share > 0.8
    # Planted doubles: they are each other's nearest, and with one neighbour passed over they part.
    rows = np.repeat(np.asarray(snapshot.rows[:1000]), 2, axis=0)
    doubles = Snapshot.of(rows)
    twins = np.arange(2000) // 2
    met = [
        measure_hardness(
            plan_of(doubles, planner="greedy", neighbours=4, skip_nearest=skip),
            doubles, twins=twins, num_batches=99,
        ).twins
        for skip in (0, 1)
    ]  # fmt: skip
    assert met[0] > 0.4 and met[1] < 0.5 * met[0], met
    labelled = plan_of(
        snapshot, planner="greedy", neighbours=8, unique=("label",),
        columns=SampleColumns(labels=owner), batch_size=16,
    )  # fmt: skip
    assert all(len(set(owner[ids].tolist())) == len(ids) for ids in batches_of(labelled))


def test_topics_fill_batches_alike_in_margins():
    rng = np.random.default_rng(3)
    snapshot, owner = mixture(4096, 8, 0.3)
    margins = rng.gamma(1.0, size=4096).astype(np.float32)  # skewed
    columns = SampleColumns(margins=margins)
    plan = plan_of(snapshot, planner="topics", cluster_size=512, columns=columns, margin_bins=4)
    edges = np.linspace(margins.min(), margins.max(), 5)[1:-1]
    assert np.mean([np.bincount(owner[b]).max() / len(b) for b in batches_of(plan)]) > 0.7
    low = np.array([(np.digitize(margins[b], edges) == 0).mean() for b in batches_of(plan)])
    drawn = np.array([(np.digitize(margins[rng.permutation(4096)[:32]], edges) == 0).mean()
                      for _ in range(128)])  # fmt: skip
    assert low.std() < 0.75 * drawn.std()
    for num in (1056, 1100, 4000):  # no whole number of topics
        odd = plan_of(snapshot, np.arange(num), planner="topics", cluster_size=512, columns=columns)
        assert odd.header.num_torn <= 4
    own = plan_of(snapshot, planner="topics")  # margins of its own
    assert (
        measure_hardness(own, snapshot).hardest
        > measure_hardness(plan_of(snapshot, planner="random"), snapshot).hardest
    )


def test_margins_that_are_not_known_are_in_a_bin_of_their_own():
    rng = np.random.default_rng(3)
    snapshot, _ = mixture(4096, 8, 0.3)
    margins = np.where(rng.random(4096) < 0.75, np.nan, rng.random(4096)).astype(np.float32)
    plan = plan_of(snapshot, planner="topics", columns=SampleColumns(margins=margins))
    unknown = [np.isnan(margins[batch]).sum() for batch in batches_of(plan)]
    assert np.std(unknown) < 0.75 * (32 * 0.75 * 0.25) ** 0.5, "drawn ones would differ more"
    nowhere = SampleColumns(margins=np.full(4096, np.nan, np.float32))
    assert sorted(plan_of(snapshot, planner="topics", columns=nowhere).order) == list(range(4096))


def test_coordinates_are_for_the_cold_start():
    rng = np.random.default_rng(0)
    points = unit_rows(rng.standard_normal((1000, 3)).astype(np.float32))
    points[5] = np.nan
    columns = SampleColumns(coordinates=points, num_samples=1000)
    knobs = NegativesConfig(planner="coordinates", neighbours=8)
    cold = make_plan(
        None, np.arange(1000), knobs, seed=0, version=0, batch_size=32, columns=columns
    )
    places = Snapshot.of(np.nan_to_num(points))
    random = plan_of(places, planner="random")
    assert measure_hardness(cold, places).hardest > measure_hardness(random, places).hardest + 0.02
    assert sorted(cold.order.tolist()) == list(range(1000))
    snapshot, _ = mixture(1000, 50)
    warm = plan_of(snapshot, planner="coordinates", columns=columns, neighbours=8)
    greedy = plan_of(snapshot, planner="greedy", columns=columns, neighbours=8)
    assert (warm.order == greedy.order).all()


def identity_plan(counts, batch=32, images=4, cluster_size=2, noise=0.1, seen=1.0):
    rng = np.random.default_rng(1)
    families = np.repeat(rng.standard_normal((len(counts) // 2 + 1, 12)), 2, axis=0)[: len(counts)]
    means = families + 0.2 * rng.standard_normal(families.shape)  # 2i and 2i + 1 look alike
    labels = rng.permutation(np.repeat(np.arange(len(counts)), counts))
    rows = means[labels] + noise * rng.standard_normal((len(labels), 12))
    steps = np.where(rng.random(len(labels)) < seen, 0, -1)
    snapshot = Snapshot.of(unit_rows(rows.astype(np.float32)), steps)
    columns = SampleColumns(labels=labels, images_per_identity=images)
    plan = plan_of(
        snapshot, planner="identities", cluster_size=cluster_size, columns=columns, batch_size=batch
    )
    return plan, labels


def test_near_identities_stand_together():
    plan, labels = identity_plan([8] * 64)
    assert sorted(plan.order.tolist()) == list(range(512))
    together = 0
    for ids in batches_of(plan):
        found, counts = np.unique(labels[ids], return_counts=True)
        assert (counts == 4).all() and len(found) == 8, "P identities with K images each"
        together += sum(label ^ 1 in found for label in found.tolist())
    assert together > 0.6 * 128
    alone, labels = identity_plan([8] * 64, cluster_size=1)
    there = [
        label ^ 1 in set(labels[ids]) for ids in batches_of(alone) for label in set(labels[ids])
    ]
    assert np.mean(there) < 0.35


@pytest.mark.parametrize("counts", [[1] * 50, [3, 9, 40, 0, 5, 4] * 6, [200, 2, 2, 4], [7] * 9])
def test_every_image_of_any_identities_comes_once(counts):
    plan, _ = identity_plan(counts, batch=16, seen=0.7)
    assert sorted(plan.order.tolist()) == list(range(sum(counts)))
    runs = np.split(plan.order, plan.bounds[1:-1])
    grouped = sum(count // 4 * 4 for count in counts)
    assert sum(len(run) for run in runs if len(run) >= 4) >= 0.5 * grouped


def test_identities_need_labels():
    snapshot, _ = mixture(100, 5)
    with pytest.raises(DataError, match=r"identities.*labels"):
        plan_of(snapshot, planner="identities")
    with pytest.raises(DataError, match=r'unique = \["caption"\].*captions'):
        plan_of(snapshot, unique=("caption",))
    with pytest.raises(DataError, match=r"locality.*shards"):
        plan_of(snapshot, locality=2)


def test_locality_touches_few_shards():
    snapshot, _ = mixture(4000, 100)
    columns = SampleColumns(shards=np.arange(4000) // 200)
    near = plan_of(snapshot, columns=columns, locality=2)
    far = plan_of(snapshot, columns=columns)
    shards = [measure_hardness(p, snapshot, shards=columns.shards).shards for p in (near, far)]
    assert shards[0] <= 4 < 10 < shards[1]
    other = plan_of(snapshot, columns=columns, locality=2, version=1)
    first = [{tuple(sorted(set(columns.shards[b].tolist()))) for b in batches_of(p)}
             for p in (near, other)]  # fmt: skip
    assert first[0] != first[1], "other groups in the next plan"


def test_mined_negatives_are_near_and_never_positives(monkeypatch):
    snapshot, owner = mixture(600, 30)
    plan = plan_of(snapshot)
    labels = LabelLists.of_rows([[label] for label in owner.tolist()])
    found = mine_negatives(plan, snapshot, 5, labels=labels)
    assert found.shape == (600, 5)
    assert (owner[found] != owner[plan.order][:, None]).all() and (found >= 0).all()
    plain = mine_negatives(plan, snapshot, 5)
    assert (owner[plain] == owner[plan.order][:, None]).mean() > 0.8
    assert (mine_negatives(plan, snapshot, 4, skip=1) == plain[:, 1:]).all()
    monkeypatch.setattr(neighbours_module, "EXACT", 100)
    monkeypatch.setattr(neighbours_module, "CELL_ROWS", 200)
    of_cells = mine_negatives(plan, snapshot, 5, labels=labels)
    assert (owner[of_cells] != owner[plan.order][:, None]).all() and (of_cells >= 0).all()
    both = [len({*a} & {*b}) for a, b in zip(found.tolist(), of_cells.tolist(), strict=True)]
    assert np.mean(both) > 2.5, "most of the nearest are in a cell of one of the trees"
    monkeypatch.undo()
    part = plan_of(snapshot, np.arange(4))  # a plan of what an epoch has left is mined as widely
    everyone = plain[np.argsort(plan.order)]
    assert (mine_negatives(part, snapshot, 5) == everyone[part.order]).all()
    carried = attach(plan, negatives=found, row_weights=np.arange(600, dtype=np.float32))
    assert (carried.row_weights == np.arange(600)).all()
    assert (attach(carried, row_weights=np.ones(600, np.float32)).negatives == found).all()
    with pytest.raises(DataError, match="negatives of shape"):
        attach(plan, negatives=found[1:])
    with pytest.raises(DataError, match="row weights"):
        attach(plan, row_weights=np.full(600, np.nan, np.float32))


@settings(max_examples=60, deadline=None)
@given(
    num=st.integers(1, 60),
    most=st.integers(0, 5),
    labels=st.integers(1, 30),
    wanted=st.integers(1, 7),
    skip=st.integers(0, 3),
    seed=st.integers(0, 99),
)
def test_negatives_of_lists_are_what_a_loop_finds(num, most, labels, wanted, skip, seed):
    rng = np.random.default_rng(seed)
    snapshot = Snapshot.of(rng.normal(size=(num, 5)), rng.integers(-1, 3, num), "print")
    rows = [rng.choice(labels, rng.integers(min(most, labels) + 1), False) for _ in range(num)]
    plan = plan_of(snapshot, rng.permutation(num)[: max(1, num // 2)])
    found = mine_negatives(plan, snapshot, wanted, skip=skip, labels=LabelLists.of_rows(rows))
    unit = unit_rows(snapshot.rows.astype(np.float32))
    usable = [i for i in range(num) if snapshot.seen[i] and len(rows[i])]
    for sample, negatives in zip(plan.order.tolist(), found.tolist(), strict=True):
        others = [i for i in usable if i != sample and not {*rows[i]} & {*rows[sample]}]
        nearest = sorted(others, key=lambda i: -float(unit[i] @ unit[sample]))
        expected = nearest[skip : skip + wanted] if sample in usable else []
        assert negatives == expected + [-1] * (wanted - len(expected))


def test_no_negatives_are_mined_from_embeddings_that_are_not_finite():
    snapshot, _ = mixture(60, 6)
    plan = plan_of(snapshot)
    rows = np.array(snapshot.rows)
    rows[7, 0] = np.nan
    with pytest.raises(DataError, match="of the samples 7"):
        mine_negatives(plan, Snapshot.of(rows, None, snapshot.fingerprint), 2)


def test_shuffled_clusters_keep_their_negatives():
    snapshot, owner = mixture(200, 10)
    some = np.arange(0, 200, 3)
    plan = plan_of(snapshot, some)
    labels = LabelLists.of_rows([[label] for label in owner.tolist()])
    plan = attach(plan, negatives=mine_negatives(plan, snapshot, 3, labels=labels))
    again = reshuffle_plan(plan, np.arange(200), version=4, asked_step=0)
    known = dict(zip(plan.order.tolist(), plan.negatives.tolist(), strict=True))
    for sample, negatives in zip(again.order.tolist(), again.negatives.tolist(), strict=True):
        assert negatives == known.get(sample, [-1] * 3)
