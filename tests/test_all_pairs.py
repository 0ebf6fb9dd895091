"""Histograms of all pairs against a loop over them: equal counts, TAR within its bound."""

import operator

import numpy as np
import pytest
import torch
from dealt_rows import DEALS, labelled_rows
from ranks import run_ranks

from data.errors import DataError
from trainer.evaluate.all_pairs import GRAIN, NUM_BINS, all_pairs, count_pairs
from trainer.evaluate.roc import Roc

FARS = (1e-3, 1e-2, 0.1)


def naive_counts(dealt) -> np.ndarray:
    """Bins of exact inner products: integers, since coordinates are multiples of 1 / GRAIN."""
    whole = np.rint(dealt.rows.double().numpy() * GRAIN).astype(np.int64)
    counts = np.zeros((2, NUM_BINS), np.int64)
    labels = dealt.labels.tolist()
    for i in range(len(labels)):
        for j in range(i):
            if labels[i] >= 0 and labels[j] >= 0:
                product = sum(map(operator.mul, whole[i].tolist(), whole[j].tolist()))
                bins = (product + 2**52) * NUM_BINS // 2**53
                counts[int(labels[i] != labels[j]), min(max(bins, 0), NUM_BINS - 1)] += 1
    return counts


def test_every_pair_is_counted_once_in_the_bin_of_its_exact_cosine():
    dealt = labelled_rows(60, 6)
    counts = count_pairs(dealt.rows, dealt.labels, None)
    assert (counts.numpy() == naive_counts(dealt)).all()
    assert counts.sum() == 59 * 58 // 2


def _count(group, dealt, bounds):
    part = dealt.part(bounds, group.rank())
    return [count_pairs(part.rows, part.labels, group, tile=tile) for tile in (7, 32, 2048)]


@pytest.mark.parametrize("bounds", DEALS)
def test_counts_are_equal_at_any_world_size_and_tile(bounds):
    dealt = labelled_rows(90, 9, dim=33)
    expected = count_pairs(dealt.rows, dealt.labels, None)
    for found in run_ranks(len(bounds) - 1, _count, dealt, bounds):
        for counts in found:
            assert torch.equal(counts, expected)


def test_tar_at_far_is_exact_to_its_printed_error():
    dealt = labelled_rows(300, 20, noise=1.4)
    numbers, curve = all_pairs(dealt.rows, dealt.labels, None, fars=FARS)
    kept = dealt.labels >= 0
    rows, labels = dealt.rows[kept].double(), dealt.labels[kept]
    first, second = np.triu_indices(len(labels), 1)
    scores = (rows @ rows.T).numpy()[first, second]
    same = (labels[first] == labels[second]).numpy()
    roc = Roc.of(scores, same)
    for far, name in zip(FARS, ("1e-3", "1e-2", "1e-1"), strict=True):
        tar, error = (numbers[f"all_pairs_TAR@FAR={name}{end}"] for end in ("", "_error"))
        assert tar <= roc.tar_at_far(far).tar <= tar + error
        assert error < 0.002
        asked = int(far * (~same).sum())
        assert numbers[f"num_all_pairs_impostors@FAR={name}"] == asked
    assert numbers["num_all_pairs_genuine"] == same.sum()
    assert numbers["num_all_pairs_impostors"] == (~same).sum()
    for point in curve:
        assert point.far == pytest.approx((scores[~same] >= point.bound).mean(), abs=1e-4)
        assert point.tar == pytest.approx((scores[same] >= point.bound).mean(), abs=1e-3)
    assert curve[-1][:2] == (1.0, 1.0)


def test_cosines_at_the_ends_and_broken_rows():
    row = torch.nn.functional.normalize(torch.ones(1, 7), dim=1)
    rows = torch.cat([row, row, -row, torch.full_like(row, torch.nan)])
    counts = count_pairs(rows, torch.tensor([0, 0, 0, 0]), None)[0]
    assert (counts[-1], counts[0], counts[NUM_BINS // 2]) == (1, 2, 3)


def test_a_gallery_without_both_kinds_is_an_error():
    rows = labelled_rows(20, 2).rows[:5]
    for labels in (torch.zeros(5), torch.arange(5), torch.full((5,), -1)):
        with pytest.raises(DataError, match="pairs of one and"):
            all_pairs(rows, labels.long(), None, fars=FARS)
