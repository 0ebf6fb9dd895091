"""Live hardness equals a naive oracle at any world size; the controller is pure and bounded."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from ranks import run_ranks
from tiny_faces import face_config
from tiny_runs import tiny_config, train_rank

from data.batch import Batch
from trainer.centers import ClassCenters
from trainer.config import CentersConfig, ConfigError
from trainer.hardness import Control, Hardness, Keyed, decide
from trainer.hardness.sample import MAX_COLUMNS, MAX_NUMBERS, NUM_ROWS, choose, choose_columns
from trainer.plots import RunLog, build_figures
from trainer.report import write_report

STEP, SEED = 7, 3


# ------------------------------------------------------------------------------------- oracle


def naive_row(cosines, kinds, scale, bar):
    """One row's numbers by plain loops; `kinds`: "+" positive, "-" negative, "." masked."""
    positives = [c for c, kind in zip(cosines, kinds, strict=True) if kind == "+"]
    negatives = sorted((c for c, k in zip(cosines, kinds, strict=True) if k == "-"), reverse=True)
    row = {"negatives": len(negatives), "masked": kinds.count("."), "usable": False}
    if not positives or not negatives:
        return row
    positive = max(positives)
    bar = positive if bar is None else bar(positive)
    weights = [math.exp(scale * (c - negatives[0])) for c in negatives]
    shares = [weight / sum(weights) for weight in weights]
    entropy = -sum(share * math.log(share) for share in shares if share > 0)
    return row | {
        "usable": True,
        "positive_cosine": positive,
        "hardest_negative": negatives[0],
        "top10_negatives": sum(negatives[:10]) / len(negatives[:10]),
        "hardness_gap": positive - negatives[0],
        "margin_violations": negatives[0] > bar,
        "closer_than_positive": negatives[0] > positive,
        "effective_negatives": math.exp(entropy),
        "num_negatives": len(negatives),
        "suspected": sum(c > positive for c in negatives),
    }


def naive(cosines, kinds, scale, bars=None, mates=None, clustered=None):
    """All rows' numbers; cosines (s, m) of any float, kinds s strings of m."""
    rounded = cosines.double().float().double().tolist()
    lines = [
        naive_row(rounded[i], kinds[i], scale, None if bars is None else bars[i])
        for i in range(len(kinds))
    ]
    used = [line for line in lines if line["usable"]]
    names = [n for n in used[0] if n not in ("usable", "negatives", "masked", "suspected")]
    numbers = {name: sum(line[name] for line in used) / len(used) for name in names}
    masked, negatives = (sum(line[n] for line in lines) for n in ("masked", "negatives"))
    numbers |= {
        "hardness_rows": len(used),
        "masked_share": masked / (masked + negatives),
        "suspected_false_negatives": sum(line["suspected"] for line in used)
        / sum(line["negatives"] for line in used),
    }
    if mates is not None:
        hits = []
        for i, line in enumerate(lines):
            if line["usable"] and clustered[i]:
                near = [j for j, c in enumerate(rounded[i]) if c == line["hardest_negative"]]
                hits.append(any(mates[i][j] and kinds[i][j] == "-" for j in near))
        numbers["cluster_mates"] = sum(hits) / len(hits)
    return numbers


def assert_same(found, expected, rel=1e-9, **distinct):
    expected = expected | distinct
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=rel, abs=rel), name


# ------------------------------------------------------------------------------------- batches


def unit(count, dim, seed):
    draw = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(count, dim, generator=draw))


def ints(count, high, seed):
    return torch.randint(high, (count,), generator=torch.Generator().manual_seed(seed))


def own(values, group):
    """Every W-th row, as the loader deals them."""
    return values if group is None else values[group.rank() :: group.size()]


def batch_of(total, group, **fields):
    whole = {
        "images": torch.zeros(total, 3, 0, 0, dtype=torch.uint8),
        "texts": torch.zeros(total, 1, dtype=torch.int64),
        "ids": torch.arange(total),
        "caption_ids": torch.arange(total) + 100,
        "labels": torch.full((total,), -1),
        "positions": torch.arange(total) + STEP * total,
        **fields,
    }
    return Batch(**{k: own(v, group) for k, v in whole.items()}, keys=[""] * total)


def hardness(group, clusters=None, total=0):
    of = None if clusters is None else lambda positions: clusters[positions - STEP * total]
    return Hardness(SEED, group, due=lambda step: step == STEP, clusters_of=of)


def chosen_of(total):
    return torch.from_numpy(choose(total, SEED, STEP))


PAIRS = [  # total, dim, scale, masks, planned
    ("pairs", 150, 5, 14.3, True, True),
    ("pairs", 64, 3, 100.0, False, True),
    ("pairs", 11, 4, 1.0, True, False),
    ("pairs", 5, 2, 30.0, False, False),
]
CENTERS = [  # total, rate, sub-centers, loss
    ("centers", 80, 1.0, 1, "arcface"),
    ("centers", 80, 0.5, 2, "cosface"),
    ("centers", 50, 0.6, 1, "softmax"),
    ("centers", 80, 1.0, 3, "sface"),
]
LABELS = [  # total, labels, over, margin
    ("labels", 70, 25, "batch", 0.3),
    ("labels", 70, 25, "all", 0.0),
    ("labels", 9, 40, "batch", 0.0),
    ("labels", 9, 40, "all", 0.3),
]
MANY = ("columns", 40 * MAX_COLUMNS)


def run_all(group):
    """Every case by the same ranks: starting them is what takes time."""
    measures = {
        "pairs": measure_pairs,
        "centers": measure_centers,
        "labels": measure_labels,
        "columns": choose_some,
    }
    return {case: measures[case[0]](group, *case[1:]) for case in (*PAIRS, *CENTERS, *LABELS, MANY)}


@pytest.fixture(scope="module")
def answers():
    """Of each case: by one process, then by each rank of three."""
    found = run_all(None), *run_ranks(3, run_all)
    return {case: [one[case] for one in found] for case in found[0]}


def clusters_of(total):
    """Of about four rows; some are in none."""
    return ints(total, max(2, total // 4), 4) - 1


# --------------------------------------------------------------------------------------- pairs


def pair_case(total, dim, masks, planned):
    images, texts = unit(total, dim, 0), unit(total, dim, 1)
    texts[1::5] = texts[0]  # ties: equal texts have equal cosines
    captions = ints(total, 9, 6)
    identities = {"ids": ints(total, total, 2), "caption_ids": captions} if masks else {}
    return images, texts, identities, clusters_of(total) if planned else None


def measure_pairs(group, total, dim, scale, masks, planned):
    images, texts, identities, clusters = pair_case(total, dim, masks, planned)
    batch = batch_of(total, group, labels=ints(total, 4, 5), caption_ids=ints(total, 9, 6))
    monitor = hardness(group, clusters, total)
    known = {name: own(values, group) for name, values in identities.items()}
    monitor.measure_pairs(batch, STEP, own(images, group), own(texts, group), scale, known)
    return monitor.numbers(), monitor.histograms()


@pytest.mark.parametrize("case", PAIRS, ids=str)
def test_pairs_equal_the_oracle_at_any_world_size(case, answers):
    _, total, dim, scale, masks, planned = case
    images, texts, identities, clusters = pair_case(total, dim, masks, planned)
    rows, kinds, mates = chosen_of(total).tolist(), [], []
    for i in rows:
        equal = [any(v[i] == v[j] for v in identities.values()) for j in range(total)]
        kinds.append("".join("+" if j == i else "-."[equal[j]] for j in range(total)))
        if planned:
            mates.append([bool(clusters[i] == clusters[j] >= 0) for j in range(total)])
    expected = naive(
        images[rows].double() @ texts.double().T,
        kinds,
        scale,
        mates=mates if planned else None,
        clustered=[bool(clusters[i] >= 0) for i in rows] if planned else None,
    )
    distinct = {
        "distinct_labels": len(set(ints(total, 4, 5).tolist())),
        "distinct_captions": len(set(ints(total, 9, 6).tolist())),
    }
    for numbers, histograms in answers[case]:
        assert_same(numbers, expected, **distinct)
        assert histograms == answers[case][0][1]
        assert sum(histograms["hardest_negative"]) == numbers["hardness_rows"]


def test_a_cluster_that_is_near_is_seen_and_a_random_one_is_not():
    total, per = 96, 4
    kernels = unit(total // per, 16, 0).repeat_interleave(per, dim=0)
    images, texts = (F.normalize(kernels + 0.3 * unit(total, 16, s)) for s in (1, 2))
    near = torch.arange(total) // per
    shares = []
    for clusters in (near, near[torch.randperm(total, generator=torch.Generator().manual_seed(0))]):
        monitor = hardness(None, clusters, total)
        monitor.measure_pairs(batch_of(total, None), STEP, images, texts, 10.0, {})
        shares.append(monitor.numbers()["cluster_mates"])
    assert shares[0] > 0.9 and shares[1] < 0.2


def test_without_clusters_there_is_no_share_of_them():
    for clusters in (None, torch.full((8,), -1)):
        monitor = hardness(None, clusters, 8)
        monitor.measure_pairs(batch_of(8, None), STEP, unit(8, 3, 0), unit(8, 3, 1), 10.0, {})
        assert "cluster_mates" not in monitor.numbers()


# ------------------------------------------------------------------------------------- centers


def build_centers(group, rate, subcenters, loss):
    config = CentersConfig(sample_rate=rate, subcenters=subcenters, init_std=1.0)
    return ClassCenters(37, 6, group, loss=loss, config=config, seed=1)


def measure_centers(group, total, rate, subcenters, loss):
    labels = ints(total, 37, 8)
    rows = own(unit(total, 6, 9) * 3, group).requires_grad_()
    centers = build_centers(group, rate, subcenters, loss)
    batch = batch_of(total, group, labels=labels)
    centers(rows, own(labels, group), batch.ids, STEP)
    held = centers.taking_part()
    monitor = hardness(group, clusters_of(total), total)
    columns = Keyed(held.classes, held.read)
    monitor.measure_centers(
        batch, STEP, rows, own(labels, group), centers.margin.scale, columns, bars=held.targets
    )
    return monitor.numbers(), held.classes.tolist()


@pytest.mark.parametrize("case", CENTERS, ids=str)
def test_centers_equal_the_oracle_at_any_world_size(case, answers):
    _, total, rate, subcenters, loss = case
    taken, clusters = answers[case][0][1], clusters_of(total).tolist()
    assert sorted(one for _, classes in answers[case][1:] for one in classes) == taken
    labels, rows = ints(total, 37, 8).tolist(), chosen_of(total).tolist()
    whole = build_centers(None, rate, subcenters, loss)
    table = whole.optimizer.rows(slice(0, 37 * subcenters)).double()
    table = F.normalize(table).view(37, subcenters, 6)[taken]
    cosines = torch.einsum("sd,mcd->smc", F.normalize(unit(total, 6, 9)[rows].double()), table)
    kinds = ["".join("+" if c == labels[i] else "-" for c in taken) for i in rows]
    mates = [
        [
            any(clusters[i] == clusters[j] >= 0 and labels[j] == c for j in range(total))
            for c in taken
        ]
        for i in rows
    ]
    margin = {
        "arcface": lambda c: math.cos(math.acos(c) + 0.5),
        "cosface": lambda c: c - 0.35,
    }.get(loss, lambda c: c)
    expected = naive(
        cosines.amax(2),
        kinds,
        whole.margin.scale,
        bars=[margin] * len(rows),
        mates=mates,
        clustered=[clusters[i] >= 0 for i in rows],
    )
    for numbers, _ in answers[case]:  # centers are made unit rows in float32
        assert_same(numbers, expected, rel=1e-5, distinct_labels=len(set(labels)))


def test_centers_are_asked_for_while_the_loss_is_there():
    centers = build_centers(None, 1.0, 1, "arcface")
    with pytest.raises(RuntimeError, match=r"taking_part\(\): no loss"):
        centers.taking_part()


# -------------------------------------------------------------------------------------- labels


def csr(total, num_labels, seed):
    """Between none and four labels a query."""
    counts = ints(total, 5, seed).tolist()
    draws = np.random.default_rng(seed)
    return [sorted(draws.choice(num_labels, n, replace=False).tolist()) for n in counts]


def pack(lists):
    offsets = torch.tensor([0, *np.cumsum([len(x) for x in lists])])
    return offsets, torch.tensor([x for part in lists for x in part], dtype=torch.int64)


def draw_labels(lists):
    return torch.tensor([part[i % len(part)] if part else -1 for i, part in enumerate(lists)])


def measure_labels(group, total, num_labels, over, margin):
    lists = csr(total, num_labels, 2)
    queries, labels = unit(total, 4, 0), unit(num_labels, 4, 1)
    mine = [lists[i] for i in own(torch.arange(total), group).tolist()]
    drawn, keys = None, own(torch.arange(num_labels), group)
    if over == "batch":
        drawn = own(draw_labels(lists), group)
        keys = drawn[drawn >= 0]  # an id may come from several queries and ranks
    monitor = hardness(group, clusters_of(total), total)
    monitor.measure_labels(
        batch_of(total, group),
        STEP,
        own(queries, group),
        20.0,
        pack(mine),
        Keyed(keys, labels[keys].__getitem__),
        drawn=drawn,
        margin=margin,
    )
    return monitor.numbers()


@pytest.mark.parametrize("case", LABELS, ids=str)
def test_labels_equal_the_oracle_at_any_world_size(case, answers):
    _, total, num_labels, over, margin = case
    lists, clusters = csr(total, num_labels, 2), clusters_of(total).tolist()
    drawn, rows = draw_labels(lists).tolist(), chosen_of(total).tolist()
    columns = sorted({x for x in drawn if x >= 0}) if over == "batch" else list(range(num_labels))

    def kind(i, label):
        if over == "all":
            return "+" if label in lists[i] else "-"
        return "+" if label == drawn[i] else "." if label in lists[i] else "-"

    def is_mate(i, label):
        of_label = [j for j in range(total) if drawn[j] == label]
        return any(clusters[i] == clusters[j] >= 0 for j in of_label)

    expected = naive(
        unit(total, 4, 0)[rows].double() @ unit(num_labels, 4, 1)[columns].double().T,
        ["".join(kind(i, c) for c in columns) for i in rows],
        20.0,
        bars=[lambda positive: positive - margin] * len(rows),
        mates=[[is_mate(i, c) for c in columns] for i in rows] if over == "batch" else None,
        clustered=[clusters[i] >= 0 for i in rows],
    )
    distinct = {"distinct_captions": total}
    if over == "batch":
        distinct["distinct_labels"] = len(columns)
    for numbers in answers[case]:
        assert_same(numbers, expected, **distinct)


def test_a_query_without_labels_is_in_no_mean():
    lists = [[], [1], []]
    monitor = hardness(None)
    monitor.measure_labels(
        batch_of(3, None),
        STEP,
        unit(3, 4, 0),
        20.0,
        pack(lists),
        Keyed(torch.arange(5), unit(5, 4, 1).__getitem__),
    )
    assert monitor.numbers()["hardness_rows"] == 1


# -------------------------------------------------------------------------- choices and bounds


@given(total=st.integers(1, 3000), seed=st.integers(0, 2**40), step=st.integers(0, 10**7))
def test_rows_are_distinct_and_a_function_of_seed_and_step(total, seed, step):
    rows = choose(total, seed, step)
    assert len(set(rows.tolist())) == len(rows) == min(NUM_ROWS, total)
    assert 0 <= rows.min() and rows.max() < total and (np.diff(rows) > 0).all()
    assert np.array_equal(rows, choose(total, seed, step))


def test_every_row_has_its_turn():
    counts = np.zeros(200)
    for step in range(500):
        counts[choose(200, 0, step)] += 1
    assert abs(counts / 500 - NUM_ROWS / 200).max() < 0.12


SURE = torch.tensor([1, 5, 4 * 100 + 1])


def choose_some(group, total, dim=3):
    keys = own(torch.arange(total) * 4 + 1, group)  # numbers with a pattern, as of quarter turns
    return keys[choose_columns(keys, SURE, group, dim=dim, seed=SEED, step=STEP)].tolist()


def test_of_very_many_columns_a_sample_stands_for_all(answers):
    alone, *others = answers[MANY]
    assert abs(len(alone) / MAX_COLUMNS - 1) < 0.05 and {*SURE.tolist()} <= {*alone}
    thirds = np.histogram(alone, 3, (0, 4 * MANY[1]))[0] / len(alone)
    assert abs(thirds - 1 / 3).max() < 0.02
    assert sorted(one for part in others for one in part) == alone
    assert choose_some(None, MAX_COLUMNS) == (torch.arange(MAX_COLUMNS) * 4 + 1).tolist()
    wide = choose_some(None, MANY[1], 1024)
    assert abs(len(wide) * 1024 / MAX_NUMBERS - 1) < 0.1


def test_work_over_very_many_centers_is_bounded():
    classes, read = 10 * MAX_COLUMNS, []

    def read_some(places):
        read.append(len(places))
        return F.normalize(torch.stack([places.sin(), places.cos(), places * 0.0 + 1], dim=1))

    monitor = hardness(None)
    labels = torch.arange(100) * 800
    monitor.measure_centers(
        batch_of(100, None, labels=labels),
        STEP,
        unit(100, 3, 0),
        labels,
        64.0,
        Keyed(torch.arange(classes), read_some),
    )
    numbers = monitor.numbers()
    assert sum(read) == pytest.approx(MAX_COLUMNS, rel=0.1) and max(read) <= 2048
    assert numbers["hardness_rows"] == NUM_ROWS, "positives are in the sample in any case"
    assert numbers["num_negatives"] == sum(read) - 1


def test_only_steps_that_are_due_are_measured():
    monitor = hardness(None)
    assert monitor.is_due(STEP) and not monitor.is_due(STEP + 1)
    assert monitor.numbers() == {} and monitor.histograms() is None


def test_one_sample_has_no_negative_and_no_number():
    monitor = hardness(None)
    monitor.measure_pairs(batch_of(1, None), STEP, unit(1, 3, 0), unit(1, 3, 1), 10.0, {})
    numbers = monitor.numbers()
    assert numbers["hardness_rows"] == 0 and math.isnan(numbers["hardest_negative"])
    assert sum(monitor.histograms()["hardest_negative"]) == 0


def test_where_all_captions_are_equal_nothing_is_a_negative():
    monitor = hardness(None)
    same = {"caption_ids": torch.zeros(6, dtype=torch.int64)}
    monitor.measure_pairs(batch_of(6, None), STEP, unit(6, 3, 0), unit(6, 3, 1), 10.0, same)
    assert monitor.numbers()["masked_share"] == 1 and monitor.numbers()["hardness_rows"] == 0


def test_rows_that_are_not_finite_are_left_out():
    images = unit(20, 3, 0)
    images[4] = math.nan
    monitor = hardness(None)
    monitor.measure_pairs(batch_of(20, None), STEP, images, unit(20, 3, 1), 10.0, {})
    numbers = monitor.numbers()
    assert numbers["hardness_rows"] == 19
    assert all(math.isfinite(value) for value in numbers.values())


def test_a_scale_beyond_the_range_of_exp_is_fine():
    monitor = hardness(None)
    monitor.measure_pairs(batch_of(20, None), STEP, unit(20, 3, 0), unit(20, 3, 1), 1e6, {})
    assert monitor.numbers()["effective_negatives"] == pytest.approx(1.0)


# ------------------------------------------------------------------------------------ the runs


def lines_of(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


@pytest.mark.parametrize(
    ("make", "sections"),
    [(tiny_config, {}), (face_config, {"centers": {"sample_rate": 0.8, "subcenters": 2}})],
    ids=["pairs", "centers"],
)
def test_every_run_says_how_hard_it_is(tmp_path, make, sections):
    train = {"duration": "5 steps"}
    config = make(tmp_path, train=train, log={"every": "2 steps", "trackers": []}, **sections)
    found = {}
    for world_size in (1, 2):
        run = tmp_path / f"run-{world_size}"
        run_ranks(world_size, train_rank, config, str(run))
        found[world_size] = lines_of(run)
    for one, two in zip(*found.values(), strict=True):
        assert one["hardness_rows"] == 16 and math.isfinite(one["hardness_gap"])
        assert two["hardest_negative"] == pytest.approx(one["hardest_negative"], abs=5e-3)
        assert two["effective_negatives"] == pytest.approx(one["effective_negatives"], rel=0.05)
    assert [line["step"] for line in found[1]] == [2, 4, 5]
    if make is face_config:
        assert found[1][0]["positive_cosine"] == pytest.approx(
            found[1][0]["target_cosine"], abs=1e-6
        )
    page = write_report(tmp_path / "run-1").read_text()
    for title in ("Hardness of the negatives", "Negatives that come close", "Effective negatives"):
        assert title in page


def test_a_planned_run_says_how_its_plan_works(tmp_path):
    config = tiny_config(
        tmp_path,
        data={"batching": "planned"},
        negatives={"cluster_size": 4, "controller": True, "dim": 8},
        train={"duration": "12 steps"},
    )
    run_ranks(2, train_rank, config, str(tmp_path / "run"))
    lines = lines_of(tmp_path / "run")
    planned = [line for line in lines if line["plan_version"] >= 0]
    assert ["cluster_mates" in line for line in lines] == [line in planned for line in lines]
    assert planned and all(0 <= line["cluster_mates"] <= 1 for line in planned)
    assert all(line["plan_age"] >= 0 for line in planned)


def test_the_report_shows_the_plan_where_there_is_one():
    lines = [
        {"step": step, "loss": 1.0, "plan_age": 10 * step, "store_age_p50": 3, "store_drift": 0.1}
        for step in (1, 2, 3)
    ]
    drawn = build_figures(RunLog(lines, [], []))
    assert [*drawn] == ["Loss", "Age of plan and embeddings", "Drift of stored embeddings"]
    legend = drawn["Age of plan and embeddings"].axes[0].get_legend()
    assert [text.get_text() for text in legend.texts] == ["plan", "embeddings, median"]


# --------------------------------------------------------------------------------- controller


def numbers_of(rows, closer):
    return {"hardness_rows": rows, "closer_than_positive": closer / rows if rows else math.nan}


def test_a_decision_follows_the_share_since_the_last_plan():
    control = Control(8)
    for closer in (2, 0, 1):
        control = control.observe(numbers_of(64, closer), cluster_size=8)
    assert (control.rows, control.closer) == (192, 3)
    for band, size in (((0.02, 0.2), 16), ((0.001, 0.01), 4), ((0.01, 0.02), 8)):
        decision, fresh = decide(control, band=band, batch_size=128)
        assert decision.cluster_size == size == fresh.cluster_size
        assert (decision.was, decision.rows, decision.closer) == (8, 192, 3)
        assert fresh == Control(size), "the history begins anew"
        assert decision == decide(control, band=band, batch_size=128)[0]
        assert json.loads(json.dumps(decision.to_json()))["cluster_size"] == size


@given(
    size=st.integers(1, 5000),
    batch_size=st.integers(1, 4096),
    rows=st.integers(0, 10**6),
    share=st.floats(0, 1),
    low=st.floats(0, 0.5),
    width=st.floats(0.01, 0.5),
)
def test_it_stays_within_one_and_the_batch(size, batch_size, rows, share, low, width):
    control = Control(size, rows, int(share * rows))
    decision, fresh = decide(control, band=(low, low + width), batch_size=batch_size)
    assert 1 <= decision.cluster_size <= batch_size
    start = min(size, batch_size)
    assert decision.cluster_size in {start, min(2 * start, batch_size), max(start // 2, 1)}
    assert Control.from_json(json.loads(json.dumps(fresh.to_json()))) == fresh
    if rows < 64:
        assert decision.cluster_size == start


def test_a_history_that_was_stored_decides_the_same():
    control = Control(4).observe(numbers_of(64, 0), cluster_size=4)
    stored = Control.from_json(json.loads(json.dumps(control.to_json())))
    assert decide(stored, band=(0.02, 0.2), batch_size=64) == decide(
        control, band=(0.02, 0.2), batch_size=64
    )


@pytest.mark.parametrize(
    ("numbers", "cluster_size"),
    [({}, 4), (numbers_of(64, 9), 1), (numbers_of(64, 9), 8), (numbers_of(0, 0), 4)],
)
def test_what_says_nothing_of_the_present_plan_does_not_count(numbers, cluster_size):
    control = Control(4, 64, 1)
    assert control.observe(numbers, cluster_size=cluster_size) == control


@pytest.mark.parametrize("band", [(0.2, 0.02), (0.1, 0.1), (-0.1, 0.5), (0.1, 1.5), (math.nan, 1)])
def test_a_band_that_is_none_is_one_clear_error(band):
    with pytest.raises(ConfigError, match=r"negatives.band = \["):
        decide(Control(4), band=band, batch_size=64)


@pytest.mark.parametrize(
    "change", [{"rows": -1}, {"closer": 65}, {"rows": 1.5}, {"size": 3}, {"cluster_size": None}]
)
def test_a_state_that_it_never_wrote_is_one_clear_error(change):
    tree = replace(Control(4), rows=64, closer=3).to_json() | change
    with pytest.raises(ConfigError, match="controller state"):
        Control.from_json(tree)
