"""Verification figures from embeddings on ranks, against loops and the naive protocol."""

import metric_oracles
import numpy as np
import pytest
import torch
from dealt_rows import DEALS, labelled_rows
from ranks import run_ranks

from data.errors import DataError
from trainer.evaluate.fetch import fetch_rows, pair_cosines
from trainer.evaluate.verification import Pairs, verification


def some_pairs(dealt, count: int, seed: int) -> Pairs:
    rng = np.random.default_rng(seed)
    places = rng.integers(0, len(dealt.ids), (count, 2))
    labels = dealt.labels.numpy()[places]
    mates = np.flatnonzero(dealt.labels.numpy() == dealt.labels.numpy()[5])
    places[::3] = rng.choice(mates, (len(places[::3]), 2))
    labels = dealt.labels.numpy()[places]
    return Pairs(dealt.ids.numpy()[places], labels[:, 0] == labels[:, 1], "pairs.tsv")


def _fetch(group, dealt, bounds, wanted):
    part = dealt.part(bounds, group.rank())
    return fetch_rows(part.rows, part.ids, wanted[group.rank()], group)


def test_rows_come_from_whichever_rank_has_them():
    dealt = labelled_rows(50, 5)
    ids = dealt.ids.numpy().copy()  # the tensor moves into shared memory on its way to ranks
    wanted = [np.append(ids[:5], 10**6), ids[:0], ids[::7]]
    for (rows, found), asked in zip(
        run_ranks(3, _fetch, dealt, [0, 0.3, 0.3, 1], wanted), wanted, strict=True
    ):
        assert found.tolist() == np.isin(asked, ids).tolist()
        places = np.searchsorted(ids, asked[found])
        assert torch.equal(rows[torch.from_numpy(found)], dealt.rows[places])
        assert not rows[torch.from_numpy(~found)].any()


def _cosines(group, dealt, bounds, pairs):
    part = dealt.part(bounds, group.rank())
    blocks = (2, 16, 1 << 16)
    return [pair_cosines(part.rows, part.ids, pairs, group, max_rows=most) for most in blocks]


@pytest.mark.parametrize("bounds", DEALS)
def test_cosines_are_bit_equal_at_any_world_size_and_block(bounds):
    dealt = labelled_rows(60, 6)
    pairs = some_pairs(dealt, 200, 1).samples
    pairs[17, 1] = 10**6  # could not be read
    expected, present = pair_cosines(dealt.rows, dealt.ids, pairs, None)
    assert present.tolist() == [i != 17 for i in range(200)]
    places = np.searchsorted(dealt.ids.numpy(), pairs[present])
    rows = dealt.rows.double().numpy()
    dots = (rows[places[:, 0]] * rows[places[:, 1]]).sum(1)
    np.testing.assert_allclose(expected[present], dots, rtol=0, atol=1e-7)
    for found in run_ranks(len(bounds) - 1, _cosines, dealt, bounds, pairs):
        for cosines, here in found:
            assert cosines.tobytes() == expected.tobytes()
            assert here.tolist() == present.tolist()


def _verify(group, dealt, bounds, pairs):
    part = dealt.part(bounds, group.rank())
    return verification(part.rows, part.ids, pairs, group, fars=(1e-3, 0.02, 0.1))[0]


def test_figures_equal_the_loops_on_any_ranks():
    dealt = labelled_rows(80, 8, noise=1.5)
    pairs = some_pairs(dealt, 120, 2)
    numbers, roc = verification(dealt.rows, dealt.ids, pairs, None, fars=(1e-3, 0.02, 0.1))
    table = metric_oracles.cosines(dealt.rows.numpy())
    places = np.searchsorted(dealt.ids.numpy(), pairs.samples)
    scores = table[places[:, 0], places[:, 1]].astype(np.float64).tolist()
    same = pairs.same.tolist()
    for far, name in ((1e-3, "1e-3"), (0.02, "2e-2"), (0.1, "1e-1")):
        expected = metric_oracles.tar_at_far(scores, same, far)
        assert numbers[f"verification_TAR@FAR={name}"] == expected
        asked = int(far * (~pairs.same).sum())
        assert numbers[f"num_verification_impostors@FAR={name}"] == asked
    mean, std = metric_oracles.fold_accuracy(scores, same)
    assert numbers["verification_accuracy"] == pytest.approx(mean, abs=1e-12)
    assert numbers["verification_accuracy_std"] == pytest.approx(std, abs=1e-12)
    assert 0.5 < numbers["verification_accuracy_grid"] < 1
    assert numbers["num_verification_genuine"] == len(roc.genuine) == pairs.same.sum()
    assert numbers["num_verification_left_out"] == 0
    for bounds in DEALS:
        for found in run_ranks(len(bounds) - 1, _verify, dealt, bounds, pairs):
            assert found == numbers


def test_pairs_of_unreadable_images_are_left_out_and_counted():
    dealt = labelled_rows(80, 8)
    pairs = some_pairs(dealt, 120, 2)
    holed = pairs.samples.copy()
    holed[[0, 50, 51]] = 10**6
    numbers, _ = verification(dealt.rows, dealt.ids, Pairs(holed, pairs.same, "p"), None)
    assert numbers["num_verification_left_out"] == 3
    kept = np.delete(np.arange(120), [0, 50, 51])
    whole, _ = verification(
        dealt.rows, dealt.ids, Pairs(pairs.samples[kept], pairs.same[kept], "p"), None
    )
    assert numbers == whole | {"num_verification_left_out": 3}


def test_a_table_without_both_kinds_or_ten_pairs_is_an_error():
    dealt = labelled_rows(80, 8)
    pairs = some_pairs(dealt, 120, 2)
    for kept in (pairs.same, ~pairs.same, np.arange(5)):
        few = Pairs(pairs.samples[kept], pairs.same[kept], "pairs.tsv")
        with pytest.raises(DataError, match=r"pairs.tsv: has \d+ pairs of one identity and"):
            verification(dealt.rows, dealt.ids, few, None)
