"""1:N figures against loops over probes, templates and thresholds, at any world size."""

import metric_oracles
import numpy as np
import pytest
import torch
from dealt_rows import DEALS, labelled_rows
from ranks import run_ranks

from data.errors import DataError
from trainer.evaluate.identification import Roles, first_enrols, identification

FPIRS = (0.02, 0.1, 0.5)
NAMES = ("2e-2", "1e-1", "5e-1")


def roles_of(dealt, *, each: int, enrolled: int) -> Roles:
    """The first `each` images of the labels below `enrolled` make the gallery."""
    ids, labels = dealt.ids.numpy().copy(), dealt.labels.numpy().copy()
    taken = np.zeros(len(ids), bool)
    for label in range(enrolled):
        taken[np.flatnonzero(labels == label)[:each]] = True
    probes = ~taken & (labels >= 0)
    return Roles(ids[taken], labels[taken], ids[probes], labels[probes], "roles.tsv")


@pytest.mark.parametrize(("each", "enrolled"), [(1, 8), (3, 5), (2, 12)])
def test_figures_equal_the_loops(each, enrolled):
    dealt = labelled_rows(100, 12, noise=1.2, seed=each)
    roles = roles_of(dealt, each=each, enrolled=enrolled)
    numbers, roc = identification(dealt.rows, dealt.ids, roles, None, fpirs=FPIRS)
    place = {number: row for row, number in enumerate(dealt.ids.tolist())}
    gallery, probes = (
        [place[i] for i in which.tolist()] for which in (roles.gallery, roles.probes)
    )
    identity = dealt.labels.tolist()
    for k in (1, 5, 10):
        for fpir, name in zip(FPIRS, NAMES, strict=True):
            rank, fnir, found = metric_oracles.identification(
                dealt.rows.numpy(), gallery, probes, identity, k, fpir
            )
            assert numbers[f"identification_rank-{k}"] == pytest.approx(rank, abs=1e-12)
            if enrolled == 12:
                assert roc is None and f"identification_FNIR@FPIR={name}" not in numbers
                continue
            assert numbers[f"identification_FNIR@FPIR={name}"] == pytest.approx(fnir, abs=1e-12)
            assert numbers[f"identification_DIR@FPIR={name}"] == pytest.approx(found, abs=1e-12)
            alarms = int(fpir * numbers["num_identification_non_mated"])
            assert numbers[f"num_identification_alarms@FPIR={name}"] == alarms
    assert 0.3 < numbers["identification_rank-1"] < 1


def _identify(group, dealt, bounds, roles):
    part = dealt.part(bounds, group.rank())
    return identification(part.rows, part.ids, roles, group, fpirs=FPIRS)[0]


@pytest.mark.parametrize("bounds", DEALS)
def test_figures_are_the_same_at_any_world_size(bounds):
    dealt = labelled_rows(100, 12, noise=1.2)
    roles = roles_of(dealt, each=2, enrolled=7)
    whole, _ = identification(dealt.rows, dealt.ids, roles, None, fpirs=FPIRS)
    for numbers in run_ranks(len(bounds) - 1, _identify, dealt, bounds, roles):
        assert numbers == whole


def test_the_rule_enrols_first_images_and_keeps_drawn_identities_out():
    dealt = labelled_rows(400, 100)
    ids, labels = dealt.ids.numpy().copy(), dealt.labels.numpy().copy()
    shuffled = np.random.default_rng(0).permutation(400)
    roles = first_enrols(ids[shuffled], labels[shuffled], non_mated=0.3, seed=5)
    again = first_enrols(ids, labels, non_mated=0.3, seed=5)
    for name in ("gallery", "gallery_identities", "probes", "probe_identities"):
        assert np.array_equal(getattr(roles, name), getattr(again, name))
    enrolled = set(roles.gallery_identities.tolist())
    assert len(enrolled) == len(roles.gallery) and 55 <= len(enrolled) <= 85
    for sample, label in zip(roles.gallery, roles.gallery_identities, strict=True):
        assert sample == ids[labels == label].min()
    used = np.concatenate([roles.gallery, roles.probes])
    assert sorted(used.tolist()) == sorted(ids[labels >= 0].tolist())
    other = first_enrols(ids, labels, non_mated=0.3, seed=6)
    assert set(other.gallery_identities.tolist()) != enrolled
    everyone = first_enrols(ids, labels, non_mated=0.0, seed=5)
    assert set(everyone.gallery_identities.tolist()) == set(labels[labels >= 0].tolist())


def test_unreadable_gallery_images_do_not_enrol():
    dealt = labelled_rows(100, 12, noise=1.2)
    roles = roles_of(dealt, each=1, enrolled=7)
    lost = int(np.flatnonzero(dealt.ids.numpy() == roles.gallery[0])[0])
    kept = torch.arange(100) != lost
    numbers, _ = identification(dealt.rows[kept], dealt.ids[kept], roles, None, fpirs=FPIRS)
    of_lost = int((roles.probe_identities == roles.gallery_identities[0]).sum())
    whole, _ = identification(dealt.rows, dealt.ids, roles, None, fpirs=FPIRS)
    moved = whole["num_identification_mated"] - numbers["num_identification_mated"]
    assert moved == of_lost > 0


def test_nobody_to_find_is_an_error():
    dealt = labelled_rows(20, 20)
    ids, labels = dealt.ids.numpy(), np.arange(20)
    roles = first_enrols(ids, labels, non_mated=0.0, seed=0)
    with pytest.raises(DataError, match="no probe's identity is in the gallery"):
        identification(dealt.rows, dealt.ids, roles, None)
    roles = Roles(ids[:0], labels[:0], ids, labels, "roles.tsv")
    with pytest.raises(DataError, match=r"roles.tsv: no probe's identity"):
        identification(dealt.rows, dealt.ids, roles, None)
