"""ROC figures against loops over every threshold and against scikit-learn, ties included."""

import metric_oracles
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score, roc_curve
from sklearn.model_selection import KFold

from trainer.evaluate.roc import (
    GRID,
    Roc,
    count_allowed,
    fold_accuracy,
    folds_in_order,
    name_share,
    tar_numbers,
    write_curves,
)

FARS = (0.0, 1e-6, 1e-3, 1e-2, 0.1, 0.25, 0.5, 1.0)


def scored_pairs(count: int, seed: int, levels: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Scores of which genuine ones are higher on the whole; with `levels`, full of ties."""
    rng = np.random.default_rng(seed)
    same = rng.random(count) < 0.4
    same[:2] = True, False
    scores = np.clip(rng.normal(0.25 * same, 0.2), -1, 1)
    if levels:
        scores = np.round(scores * levels) / levels
    return scores.astype(np.float32), same


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 40), st.integers(0, 10**6), st.sampled_from([0, 2, 5]))
def test_tar_at_far_tries_every_threshold(count, seed, levels):
    scores, same = scored_pairs(count, seed, levels)
    roc = Roc.of(scores, same)
    for far in FARS:
        point = roc.tar_at_far(far)
        assert point.tar == metric_oracles.tar_at_far(scores.tolist(), same.tolist(), far)
        assert point.far <= far
        assert point.far == np.mean(scores[~same] > point.bound)
        assert point.num_impostors == int(far * (~same).sum() + 1e-9)


@pytest.mark.parametrize("levels", [0, 20])
def test_equal_to_scikit_learn(levels):
    scores, same = scored_pairs(3000, 1, levels)
    roc = Roc.of(scores, same)
    far, tar, _ = roc_curve(same, scores, drop_intermediate=False)
    assert roc.auc() == pytest.approx(roc_auc_score(same, scores), abs=1e-12)
    for asked in FARS:
        assert roc.tar_at_far(asked).tar == tar[far <= asked].max()
    at = int(np.argmax(far + tar >= 1))
    low = np.array([far[at - 1], tar[at - 1]])
    step = np.array([far[at], tar[at]]) - low
    expected = low[0] + step[0] * (1 - low.sum()) / step.sum()
    assert roc.eer() == pytest.approx(expected, abs=1e-12)
    points = {(p.far, p.tar) for p in roc.curve()}
    assert points <= set(zip(far.tolist(), tar.tolist(), strict=True))
    assert (1.0, 1.0) in points and len(points) > 10


def test_perfect_reversed_and_constant_scores():
    same = np.array([True, True, False, False])
    perfect = Roc.of(np.array([0.9, 0.8, 0.1, 0.2]), same)
    assert (perfect.auc(), perfect.eer(), perfect.tar_at_far(0.0).tar) == (1.0, 0.0, 1.0)
    reverse = Roc.of(np.array([0.1, 0.2, 0.9, 0.8]), same)
    assert (reverse.auc(), reverse.eer(), reverse.tar_at_far(0.5).tar) == (0.0, 1.0, 0.0)
    for value in (0.5, np.nan):
        constant = Roc.of(np.full(4, value), same)
        assert (constant.auc(), constant.eer(), constant.tar_at_far(0.9).tar) == (0.5, 0.5, 0.0)
        assert constant.tar_at_far(1.0).tar == 1.0


def test_a_score_that_is_not_a_number_is_below_all():
    same = np.array([True, True, False, False])
    roc = Roc.of(np.array([0.9, np.nan, 0.1, -1.0]), same)
    assert roc.auc() == 0.5
    assert roc.tar_at_far(0.5).tar == 0.5
    with pytest.raises(ValueError, match="2 genuine and 0 impostor"):
        Roc.of(np.array([0.1, 0.2]), np.array([True, True]))


def test_the_impostors_that_a_rate_allows_are_counted_exactly():
    for total in (1, 3, 10, 300, 3000, 15_638_932):
        for count in {0, 1, total // 3, total - 1, total}:
            assert count_allowed(count / total, total) == count
            assert count_allowed(np.nextafter(count / total, -1), total) == max(0, count - 1)
    assert count_allowed(1e-6, 15_638_932) == 15
    assert count_allowed(1e-3, 3000) == 3


@settings(max_examples=40, deadline=None)
@given(st.integers(10, 45), st.integers(0, 10**6), st.sampled_from([0, 2, 8]))
def test_folds_equal_the_naive_protocol(count, seed, levels):
    scores, same = scored_pairs(count, seed, levels)
    scores = scores.astype(np.float64)
    for grid in (False, True):
        tried = [1 - d / 2 for d in GRID] if grid else None
        expected = metric_oracles.fold_accuracy(scores.tolist(), same.tolist(), 10, tried)
        if grid and any(abs(2 - 2 * s - d) < 1e-9 for s in scores for d in GRID):
            continue  # a distance on the grid itself: rounding decides, in the oracle too
        runs = np.array_split(np.arange(count), 10)
        assert fold_accuracy(scores, same, runs, grid=grid) == pytest.approx(expected, abs=1e-12)


def test_the_grid_is_the_published_protocol():
    """KFold in file order, squared distances below 0, 0.01, ..., first best: insightface's."""
    scores, same = scored_pairs(600, 7)
    distances = 2 - 2 * scores.astype(np.float64)
    accuracies = []
    for train, test in KFold(10, shuffle=False).split(scores):
        right = [((distances[train] < t) == same[train]).mean() for t in np.arange(0, 4, 0.01)]
        chosen = np.arange(0, 4, 0.01)[int(np.argmax(right))]
        accuracies.append(((distances[test] < chosen) == same[test]).mean())
    folds, by_kind = folds_in_order(same)
    assert not by_kind
    mean, std = fold_accuracy(scores, same, folds, grid=True)
    assert mean == pytest.approx(np.mean(accuracies), abs=1e-12)
    assert std == pytest.approx(np.std(accuracies), abs=1e-12)
    exact, _ = fold_accuracy(scores, same, folds, grid=False)
    assert abs(exact - mean) < 0.02


def test_folds_with_broken_scores():
    same = np.arange(40) % 2 == 0
    scores = np.where(same, 0.5, np.nan)
    folds, _ = folds_in_order(same)
    assert fold_accuracy(scores, same, folds, grid=False) == (1.0, 0.0)
    assert fold_accuracy(scores, same, folds, grid=True) == (1.0, 0.0)
    nothing = np.full(40, np.nan)
    assert fold_accuracy(nothing, same, folds, grid=False) == (0.5, 0.0)


def test_a_table_sorted_by_kind_is_cut_by_kind():
    """Otherwise the threshold of a fold of genuine pairs is chosen on too many impostors."""
    lfw = np.tile(np.repeat([True, False], 300), 10)
    runs, by_kind = folds_in_order(lfw)
    assert not by_kind and [(run[0], len(run)) for run in runs[:2]] == [(0, 600), (600, 600)]
    kinds = [np.array_split(np.flatnonzero(kind), 10) for kind in (lfw, ~lfw)]
    for run, *parts in zip(runs, *kinds, strict=True):
        assert run.tolist() == sorted(np.concatenate(parts).tolist()), "both ways are the same"
    same = np.arange(1000) < 500
    folds, by_kind = folds_in_order(same)
    assert by_kind and [same[fold].sum() for fold in folds] == [50] * 10
    assert sorted(np.concatenate(folds).tolist()) == list(range(1000))
    scores, _ = scored_pairs(1000, 4)
    scores = np.where(same, scores + 0.1, scores)
    accuracy, _ = fold_accuracy(scores, same, folds, grid=False)
    assert (
        accuracy > 0.5 > fold_accuracy(scores, same, np.split(np.arange(1000), 10), grid=False)[0]
    )
    few = np.arange(12) < 1
    assert sorted(np.concatenate(folds_in_order(few)[0]).tolist()) == list(range(12))


def test_names_of_numbers_and_the_file_of_curves(tmp_path):
    assert [name_share(s) for s in (1e-6, 0.1, 1, 2.5e-4)] == ["1e-6", "1e-1", "1e0", "2.5e-4"]
    scores, same = scored_pairs(200, 3)
    roc = Roc.of(scores, same)
    numbers = tar_numbers("verification", roc, (1e-6, 0.1))
    assert numbers["verification_TAR@FAR=1e-1"] == roc.tar_at_far(0.1).tar
    assert numbers["num_verification_impostors@FAR=1e-6"] == 0
    write_curves(tmp_path / "roc.tsv", {"verification": roc.curve()})
    head, *lines = (tmp_path / "roc.tsv").read_text().splitlines()
    assert head.split("\t") == ["curve", "far", "tar", "bound"]
    assert [line.split("\t")[0] for line in lines] == ["verification"] * len(roc.curve())
    assert lines[-1].split("\t")[1:] == ["1", "1", "-inf"]
