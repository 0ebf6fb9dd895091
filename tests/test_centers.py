"""Class centers in parts equal one process with a dense float64 matrix and autograd."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from margin_oracles import MarginOracle
from ranks import run_ranks

from trainer.centers import ClassCenters
from trainer.centers.parts import Part
from trainer.centers.sampling import BLOCK, sample_classes
from trainer.config import CENTER_LOSSES, CentersConfig, LossConfig

C, D, N, LR = 23, 6, 13, 0.3
PLAIN = {"momentum": 0.0, "weight_decay": 0.0, "norm_bounds": (0.0, 1e9), "init_std": 0.7}
OPTIONS = [
    {"gradient": "detached"},
    {"beyond_pi": "none"},
    {"filter": "drop", "filter_threshold": 0.2},
    {"filter": "zero", "filter_threshold": 0.2},
]
CASES = [
    *[({"name": name, "scale": 9.0}, 1) for name in CENTER_LOSSES],
    *[({"name": "arcface", "scale": 40.0, **options}, 1) for options in OPTIONS],
    ({"name": "sface", "filter": "zero", "filter_threshold": 0.2}, 1),
    ({"name": "arcface", "scale": 30.0}, 3),
    ({"name": "curricularface", "scale": 9.0}, 2),
    ({"name": "sface"}, 2),
]


def batch(seed: int):
    """Embeddings of many lengths, labels of few and of many samples, ids in no order."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(N, D, generator=generator, dtype=torch.float64)
    rows *= torch.rand(N, 1, generator=generator, dtype=torch.float64) * 60
    labels = torch.randint(0, C, (N,), generator=generator)
    ids = torch.randperm(1000, generator=generator)[:N]
    return rows, labels, ids


def own_part(world_size: int, rank: int) -> slice:
    """Ragged: the last rank has most, and with four ranks the first has none."""
    cuts = {1: [0, N], 2: [0, 4, N], 3: [0, 1, 5, N], 4: [0, 0, 3, 8, N]}[world_size]
    return slice(cuts[rank], cuts[rank + 1])


def run_cases(group, cases, centers_options):
    """For each case: three losses and gradients of this rank, then its rows of the centers."""
    found = []
    for loss, subcenters in cases:
        config = CentersConfig(**{**PLAIN, **centers_options}, subcenters=subcenters)
        centers = ClassCenters(
            C, D, group, loss=LossConfig(**loss), config=config, seed=5, dtype=torch.float64
        )
        values, gradients = [], []
        for step in range(3):
            rows, labels, ids = batch(step)
            own = own_part(group.size(), group.rank())
            mine = rows[own].clone().requires_grad_()
            value = centers(mine, labels[own], ids[own])
            (2 * value).backward()
            values.append(value.item())
            gradients.append(mine.grad / 2 if mine.grad is not None else torch.zeros(0, D))
            centers.step(LR / 2)  # the loss counted twice
        table = centers.optimizer.rows(slice(0, centers.optimizer.num_rows)).clone()
        found.append((values, gradients, table))
    return found


def dense(loss: dict, subcenters: int, optimizer=None):
    """The same three steps with the whole (N, C) matrix and autograd."""
    start = ClassCenters(
        C,
        D,
        loss=LossConfig(**loss),
        config=CentersConfig(**PLAIN, subcenters=subcenters),
        seed=5,
        dtype=torch.float64,
    )
    table = start.optimizer.rows(slice(0, C * subcenters)).clone().requires_grad_()
    optimizer = (optimizer or torch.optim.SGD)([table], lr=LR)
    oracle = MarginOracle(**loss, seed=5)
    values, gradients = [], []
    for step in range(3):
        rows, labels, ids = batch(step)
        rows.requires_grad_()
        units = torch.nn.functional.normalize(table, dim=1)
        cosines = torch.nn.functional.normalize(rows, dim=1) @ units.T
        cosines = cosines.view(N, C, subcenters).amax(2)
        losses = oracle.losses(cosines, labels, rows.norm(dim=1), ids, step)
        optimizer.zero_grad()
        losses.mean().backward()
        optimizer.step()
        values.append(losses.detach())
        gradients.append(rows.grad)
    return values, gradients, table.detach()


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_every_loss_equals_the_dense_one_at_any_world_size(world_size):
    ranks = run_ranks(world_size, run_cases, CASES, {})
    for number, (loss, subcenters) in enumerate(CASES):
        losses, gradients, table = dense(loss, subcenters)
        found = [rank[number] for rank in ranks]
        for step in range(3):
            mean = sum(values[step] for values, _, _ in found) / world_size
            assert mean == pytest.approx(float(losses[step].mean()), abs=1e-10), loss
            for rank, (values, _, _) in enumerate(found):
                own = losses[step][own_part(world_size, rank)].sum() * world_size / N
                assert values[step] == pytest.approx(float(own), abs=1e-10), loss
            whole = torch.cat([gradients[step] for _, gradients, _ in found]) / world_size
            torch.testing.assert_close(whole, gradients[step], rtol=0, atol=1e-10)
        rows = torch.cat([table for _, _, table in found])
        torch.testing.assert_close(rows, table, rtol=0, atol=1e-10)


def sampled_rank(group, loss, options, steps):
    centers = ClassCenters(
        C,
        D,
        group,
        loss=LossConfig(**loss),
        config=CentersConfig(**{**PLAIN, **options}),
        seed=5,
        dtype=torch.float64,
    )
    losses = []
    for step in range(steps):
        rows, labels, ids = batch(step)
        own = own_part(group.size(), group.rank())
        value = centers(rows[own].requires_grad_(), labels[own], ids[own])
        value.backward()
        centers.step(LR)
        losses.append(value.item())
    return losses, centers.optimizer.rows(slice(0, centers.optimizer.num_rows)).clone()


@pytest.mark.parametrize("correction", [True, False])
def test_sampled_classes_are_the_same_at_any_world_size_and_weighed(correction):
    loss = {"name": "cosface", "scale": 9.0}
    options = {"sample_rate": 0.7, "correction": correction}
    (alone,) = run_ranks(1, sampled_rank, loss, options, 1)
    rows, labels, _ = batch(0)
    sample = sample_classes(Part(0, C, C), np.unique(labels), 0.7, seed=5, step=0)
    assert len(sample.classes) == int(0.7 * C)
    weights = torch.full((C,), -torch.inf, dtype=torch.float64)
    weights[sample.classes] = torch.from_numpy(sample.log_weights) * correction
    start = ClassCenters(C, D, config=CentersConfig(**PLAIN), seed=5, dtype=torch.float64)
    units = torch.nn.functional.normalize(start.optimizer.rows(slice(0, C)), dim=1)
    logits = torch.nn.functional.normalize(rows, dim=1) @ units.T * 9.0 + weights
    logits[torch.arange(N), labels] -= 9.0 * 0.35
    exact = torch.nn.functional.cross_entropy(logits, labels)
    assert alone[0][0] == pytest.approx(float(exact), abs=1e-10)
    alone = run_ranks(1, sampled_rank, loss, options, 3)[0]
    for world_size in (2, 3):
        ranks = run_ranks(world_size, sampled_rank, loss, options, 3)
        for step in range(3):
            mean = sum(losses[step] for losses, _ in ranks) / world_size
            assert mean == pytest.approx(alone[0][step], abs=1e-10)
        table = torch.cat([rows for _, rows in ranks])
        torch.testing.assert_close(table, alone[1], rtol=0, atol=1e-10)


def test_untouched_centers_stay_and_touched_ones_move():
    options = {"sample_rate": 0.5, "momentum": 0.9}
    loss = {"name": "arcface", "scale": 9.0}
    (_, table), *_ = run_ranks(1, sampled_rank, loss, options, 1)
    _, labels, _ = batch(0)
    sample = sample_classes(Part(0, C, C), np.unique(labels), 0.5, seed=5, step=0)
    start = ClassCenters(C, D, config=CentersConfig(**PLAIN), seed=5, dtype=torch.float64)
    moved = (table != start.optimizer.rows(slice(0, C))).any(1)
    assert moved.nonzero()[:, 0].tolist() == sample.classes.tolist()


@settings(max_examples=60, deadline=None)
@given(
    num_classes=st.integers(2, 3 * BLOCK),
    rate=st.floats(0.001, 1),
    world_size=st.integers(1, 5),
    step=st.integers(0, 10**6),
    data=st.data(),
)
def test_samples_keep_positives_have_their_size_and_know_no_ranks(
    num_classes, rate, world_size, step, data
):
    positives = np.array(
        sorted(data.draw(st.sets(st.integers(0, num_classes - 1), max_size=40)))
    ).astype(np.int64)
    parts = [Part.of_rank(num_classes, rank, world_size) for rank in range(world_size)]
    assert [part.start for part in parts[1:]] == [part.stop for part in parts[:-1]]
    found = []
    for part in parts:
        sample = sample_classes(part, positives, rate, seed=3, step=step)
        assert (np.diff(sample.classes) > 0).all()
        found.append(sample.classes + part.start)
    whole = sample_classes(Part(0, num_classes, num_classes), positives, rate, seed=3, step=step)
    assert np.concatenate(found).tolist() == whole.classes.tolist()
    assert np.isin(positives, whole.classes).all()
    assert max(int(rate * num_classes), 0) <= len(whole.classes)
    assert len(whole.classes) <= int(rate * num_classes) + len(positives) + -(-num_classes // BLOCK)
    others = num_classes - len(positives)
    if num_classes <= BLOCK:
        assert len(whole.classes) - len(positives) >= int(rate * others) // 2
    # Those drawn stand for all others, in a last block of few classes too.
    drawn = ~np.isin(whole.classes, positives)
    assert np.exp(whole.log_weights[drawn]).sum() == pytest.approx(others)


@pytest.mark.parametrize(("num_classes", "rate"), [(20, 0.1), (BLOCK + 1, 0.5)])
def test_every_class_is_stood_for(num_classes, rate):
    """Positives take all places of the rate, or the last block is too short for one."""
    positives, steps = np.array([0, 3, 4, 5]), 300
    weights = np.zeros(num_classes)
    for step in range(steps):
        sample = sample_classes(
            Part(0, num_classes, num_classes), positives, rate, seed=1, step=step
        )
        weights[sample.classes] += np.exp(sample.log_weights) / steps
    assert weights[positives] == pytest.approx(1)
    assert weights[-1] == pytest.approx(1, abs=0.9)
    assert weights.sum() == pytest.approx(num_classes)
    alone = sample_classes(
        Part(0, num_classes, num_classes), positives, 1e-9, seed=1, step=0, weighed=False
    )
    assert alone.classes.tolist() == positives.tolist()


def test_every_class_is_drawn_alike_and_pairs_too():
    counts, together, steps = np.zeros(40), np.zeros((40, 40)), 4000
    for step in range(steps):
        classes = sample_classes(Part(0, 40, 40), np.array([7]), 0.25, seed=1, step=step).classes
        counts[classes] += 1
        together[np.ix_(classes, classes)] += 1
    others = np.delete(np.arange(40), 7)
    assert counts[7] == steps
    expected = steps * 9 / 39
    assert abs(counts[others] - expected).max() < 5 * np.sqrt(expected)
    pairs = together[np.ix_(others, others)][np.triu_indices(39, 1)]
    assert abs(pairs - steps * 9 * 8 / (39 * 38)).max() < 5 * np.sqrt(steps * 72 / 1482)


def test_hard_negatives_are_the_nearest_centers_and_fewer_random_ones():
    config = CentersConfig(
        **PLAIN, sample_rate=0.8, hard_share=0.5, hard_neighbours=3, hard_every=1
    )
    centers = ClassCenters(C, D, loss="cosface", config=config, seed=5, dtype=torch.float64)
    rows, labels, ids = batch(0)
    centers(rows.requires_grad_(), labels, ids).backward()
    centers.step(LR)  # refreshes the lists
    units = torch.nn.functional.normalize(centers.optimizer.rows(slice(0, C)), dim=1)
    cosines = (units @ units.T).fill_diagonal_(-2)
    assert centers.neighbours.lists.tolist() == cosines.topk(3).indices.tolist()
    positives = np.unique(labels[:4])
    hard = centers.neighbours.of(positives, None)
    nearest = {int(j) for i in positives for j in cosines[i].topk(3).indices}
    assert set(hard.tolist()) == nearest
    sample = sample_classes(
        Part(0, C, C), positives, 0.8, seed=5, step=1, hard=hard, hard_share=0.5
    )
    room = (int(0.8 * C) - len(positives)) // 2
    wanted = [j for j in hard.tolist() if j not in positives][:room]
    assert set(wanted) <= set(sample.classes.tolist())
    sure = sample.classes[sample.log_weights == 0]
    assert set(sure.tolist()) == {*wanted, *positives.tolist()}


def neighbour_rank(group):
    config = CentersConfig(**PLAIN, sample_rate=0.8, hard_share=0.5, hard_neighbours=4)
    centers = ClassCenters(C, D, group, config=config, seed=5, dtype=torch.float64)
    centers.neighbours.refresh(centers.optimizer, C, group)
    return centers.neighbours.lists, centers.neighbours.of(np.array([1, 9, 20]), group)


def test_neighbours_are_the_same_at_any_world_size():
    (lists, hard), *_ = run_ranks(1, neighbour_rank)
    for world_size in (2, 3):
        ranks = run_ranks(world_size, neighbour_rank)
        assert torch.equal(torch.cat([part for part, _ in ranks]), lists)
        assert all(set(found) == set(hard) for _, found in ranks)


def one_sided_rank(group, options, classes):
    """All identities of the batch lie on the first rank, and the last rank has no sample."""
    config = CentersConfig(**{**PLAIN, **options})
    centers = ClassCenters(
        classes, D, group, loss="cosface", config=config, seed=5, dtype=torch.float64
    )
    rows, labels, ids = batch(0)
    last = group.rank() == group.size() - 1 > 0
    own = slice(0, 0) if last else slice(group.rank(), N, max(1, group.size() - 1))
    mine = rows[own].clone().requires_grad_()
    value = centers(mine, labels[own] % 2, ids[own])
    value.backward()
    centers.step(LR)
    return value.item(), centers.optimizer.rows(slice(0, centers.optimizer.num_rows)).clone()


@pytest.mark.parametrize("options", [{}, {"sample_rate": 0.4}], ids=str)
@pytest.mark.parametrize("classes", [C, 3])
def test_a_rank_without_positives_samples_or_classes_does_its_part(options, classes):
    ((alone, table),) = run_ranks(1, one_sided_rank, options, classes)
    for world_size in (2, 4):
        ranks = run_ranks(world_size, one_sided_rank, options, classes)
        assert sum(value for value, _ in ranks) / world_size == pytest.approx(alone, abs=1e-10)
        rows = torch.cat([rows for _, rows in ranks])
        torch.testing.assert_close(rows, table, rtol=0, atol=1e-10)


def failing_rank(group, labels, columns):
    centers = ClassCenters(C, D, group, seed=5)
    own = labels[group.rank()]
    try:
        centers(torch.randn(len(own), columns), torch.tensor(own))
    except ValueError as error:
        return str(error)
    return ""


def test_bad_labels_of_one_rank_are_one_error_on_all():
    for text in run_ranks(2, failing_rank, [[0, 1], [2, C]], D):
        assert text.startswith(f"label {C} of sample 3 is not in [0, {C})")
    for text in run_ranks(2, failing_rank, [[-1, 1], [2, 3]], D):
        assert "label -1 of sample 0" in text
    assert "labels is torch.float32" in run_ranks(1, failing_rank, [[0.5, 1.0]], D)[0]
    assert "columns" in run_ranks(1, failing_rank, [[0, 1]], D + 1)[0]


def test_misuse_is_named():
    centers = ClassCenters(C, D, seed=5)
    with pytest.raises(RuntimeError, match="no loss has been back-propagated"):
        centers.step(0.1)
    rows, labels, _ = batch(0)
    rows = rows.float().requires_grad_()
    with torch.no_grad():
        assert centers(rows, labels) > 0
    centers(rows, labels).backward()
    with pytest.raises(RuntimeError, match="two losses before one step"):
        centers(rows, labels)
    centers.discard()
    before = centers.optimizer.rows(slice(0, C)).clone()
    centers(rows, labels).backward()
    centers.discard()
    assert torch.equal(centers.optimizer.rows(slice(0, C)), before)
    with pytest.raises(ValueError, match="at least 2"):
        ClassCenters(1, D)


@pytest.mark.parametrize(
    ("scale", "far"), itertools.product([1.0, 64.0, 500.0], [False, True]), ids=str
)
def test_float32_is_finite_and_right_where_exp_would_overflow(scale, far):
    loss = {"name": "arcface", "scale": scale}
    found = {}
    for dtype in (torch.float32, torch.float64):
        config = CentersConfig(**PLAIN)
        centers = ClassCenters(C, D, loss=LossConfig(**loss), config=config, seed=5, dtype=dtype)
        labels = torch.arange(10)
        rows = centers.optimizer.rows(slice(0, 10)).double() * (-1 if far else 1)
        rows = rows.to(dtype).requires_grad_()
        value = centers(rows, labels)
        value.backward()
        found[dtype] = value.item(), rows.grad.double()
    (value, gradient), (exact, right) = found[torch.float32], found[torch.float64]
    assert value == pytest.approx(exact, rel=2e-5, abs=1e-5)
    torch.testing.assert_close(gradient, right, rtol=1e-3, atol=1e-4 * scale)
