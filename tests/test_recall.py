"""Leave-one-out recall and MAP@R against sorting, ties and all, at any world size."""

import metric_oracles
import pytest
import torch
import torch.nn.functional as F
from dealt_rows import DEALS, labelled_rows
from ranks import run_ranks

from data.errors import DataError
from trainer.evaluate.recall import leave_one_out


def _recall(group, dealt, bounds):
    return leave_one_out(*dealt.part(bounds, group.rank()), group, ks=(1, 3, 5))


@pytest.mark.parametrize("seed", range(4))
def test_recall_equals_sorting_all_others(seed):
    dealt = labelled_rows(70, 9, seed=seed, noise=1.5)
    numbers = leave_one_out(*dealt, None, ks=(1, 3, 5))
    for k in (1, 3, 5):
        recall, precision = metric_oracles.leave_one_out(
            dealt.rows.numpy(), dealt.ids.tolist(), dealt.labels.tolist(), k
        )
        assert numbers[f"recall_R@{k}"] == recall
        assert numbers["recall_MAP@R"] == pytest.approx(precision, abs=1e-12)
    assert 0 < numbers["recall_R@1"] < 1
    assert 67 <= numbers["num_recall_queries"] <= 69, "one is unlabelled, some may be alone"


@pytest.mark.parametrize("bounds", DEALS)
def test_recall_is_the_same_at_any_world_size(bounds):
    dealt = labelled_rows(70, 30, seed=7, noise=1.5)
    whole = leave_one_out(*dealt, None, ks=(1, 3, 5))
    for numbers in run_ranks(len(bounds) - 1, _recall, dealt, bounds):
        assert numbers == whole


def test_equal_rows_are_ranked_by_id_and_the_query_is_left_out():
    rows = F.normalize(torch.ones(6, 4), dim=1)
    ids, labels = torch.arange(6), torch.tensor([0, 1, 0, 1, 2, -1])
    numbers = leave_one_out(rows, ids, labels, None, ks=(1, 2, 3))
    # 2 finds 0 first; 0 sees 1, 2 and 3 sees 0, 1; 1 sees 0, 2, 3
    assert [numbers[f"recall_R@{k}"] for k in (1, 2, 3)] == [1 / 4, 3 / 4, 1.0]
    assert numbers["num_recall_queries"] == 4 and numbers["num_recall_labels"] == 3


def test_broken_rows_score_at_chance():
    rows = torch.full((40, 4), torch.nan)
    numbers = leave_one_out(rows, torch.arange(40), torch.arange(40) % 4, None)
    assert numbers["recall_R@1"] == pytest.approx(9 / 40)


def test_labels_that_nobody_shares_are_an_error():
    rows = F.normalize(torch.randn(5, 4), dim=1)
    with pytest.raises(DataError, match="5 labelled images have 5 labels"):
        leave_one_out(rows, torch.arange(5), torch.arange(5), None)
    with pytest.raises(DataError, match="0 labelled images have 0 labels"):
        leave_one_out(rows, torch.arange(5), torch.full((5,), -1), None)
