"""The template protocol against means and sums in loops; the bootstrap against drawn tables."""

import metric_oracles
import numpy as np
import pytest
import torch
from dealt_rows import DEALS, Dealt, labelled_rows
from ranks import run_ranks

from data.errors import DataError
from trainer.evaluate.ijb import Flags, Protocol, Scored, bootstrap_tars, ijb
from trainer.evaluate.roc import Roc
from trainer.evaluate.templates import Members, pool_templates

FARS = (1e-3, 0.02, 0.1)


def lengthened(count: int, num_labels: int) -> Dealt:
    """Rows of various lengths, as a face model gives them."""
    dealt = labelled_rows(count, num_labels, noise=1.3)
    lengths = torch.rand(count, 1, generator=torch.Generator().manual_seed(3)) * 20 + 5
    return dealt._replace(rows=dealt.rows * lengths)


def protocol_of(dealt: Dealt, num_templates: int, seed: int = 0) -> tuple[Protocol, dict]:
    """Templates of one to six images of a label in one to three media; also as plain lists."""
    rng = np.random.default_rng(seed)
    labels, ids = dealt.labels.numpy().copy(), dealt.ids.numpy().copy()
    whose, rows, naive = [], [], {}
    for template in range(num_templates):
        label = labels[labels >= 0][rng.integers((labels >= 0).sum())]
        images = rng.choice(np.flatnonzero(labels == label), rng.integers(1, 7))
        media = rng.integers(100, 103, len(images))
        whose.append(label)
        rows += [(template, medium, ids[i]) for i, medium in zip(images, media, strict=True)]
        naive[template] = [images[media == medium].tolist() for medium in np.unique(media)]
    members = Members.of(*np.array(rng.permutation(rows), np.int64).T, num_templates)
    pairs = rng.integers(0, num_templates, (400, 2))
    whose = np.array(whose)
    scores = rng.random(len(ids)).astype(np.float32)
    same = whose[pairs[:, 0]] == whose[pairs[:, 1]]
    return Protocol(members, ids, scores, pairs, same, "meta"), naive


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("score", [True, False])
def test_figures_equal_the_loops(norm, score):
    dealt = lengthened(80, 10)
    protocol, naive = protocol_of(dealt, 40)
    flags = Flags(norm=norm, score=score, flip=False)
    numbers, roc = ijb(dealt.rows, dealt.ids, protocol, None, flags=flags, fars=FARS)
    rows = dealt.rows.double().numpy()
    if not norm:
        rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    if score:
        rows = rows * protocol.scores[:, None]
    templates = np.stack(
        [
            metric_oracles.template([[rows[i] for i in images] for images in naive[template]])
            for template in range(40)
        ]
    ).astype(np.float64)
    scores = (templates[protocol.pairs[:, 0]] * templates[protocol.pairs[:, 1]]).sum(1)
    expected = Roc.of(scores, protocol.same)
    name = f"ijb_N{norm:d}D{score:d}F0"
    np.testing.assert_allclose(roc.genuine, expected.genuine, rtol=0, atol=3e-7)
    np.testing.assert_allclose(roc.impostors, expected.impostors, rtol=0, atol=3e-7)
    assert numbers[f"{name}_AUC"] == pytest.approx(expected.auc(), abs=1e-4)
    assert numbers[f"{name}_TAR@FAR=2e-2"] == roc.tar_at_far(0.02).tar
    assert numbers["num_ijb_genuine"] + numbers["num_ijb_impostors"] == 400
    assert numbers["num_ijb_templates"] == 40


def _pool_and_score(group, dealt, bounds, protocol):
    part = dealt.part(bounds, group.rank())
    pooled = [
        pool_templates(part.rows, part.ids, protocol.members, group, max_rows=most)
        for most in (1, 9, 1 << 16)
    ]
    flags = Flags(norm=True, score=True, flip=True)
    numbers, _ = ijb(
        part.rows, part.ids, protocol, group, flags=flags, fars=FARS, num_replicates=7, seed=3
    )
    return pooled, numbers


@pytest.mark.parametrize("bounds", DEALS)
def test_templates_and_figures_are_bit_equal_on_any_ranks(bounds):
    dealt = lengthened(80, 10)
    protocol, _ = protocol_of(dealt, 40)
    flags = Flags(norm=True, score=True, flip=True)
    whole, _ = ijb(
        dealt.rows, dealt.ids, protocol, None, flags=flags, fars=FARS, num_replicates=7, seed=3
    )
    rows, numbers = pool_templates(dealt.rows, dealt.ids, protocol.members, None)
    ranks = run_ranks(len(bounds) - 1, _pool_and_score, dealt, bounds, protocol)
    for block in range(3):
        assert torch.equal(torch.cat([pooled[block][0] for pooled, _ in ranks]), rows)
        assert np.concatenate([p[block][1] for p, _ in ranks]).tolist() == numbers.tolist()
    for _, found in ranks:
        assert found == whole
    assert whole["num_ijb_replicates"] == 7
    low, high = (whole[f"ijb_N1D1F1_TAR@FAR=1e-1_{end}"] for end in ("low", "high"))
    assert low < whole["ijb_N1D1F1_TAR@FAR=1e-1"] < high


def test_a_template_without_any_image_costs_its_pairs():
    dealt = lengthened(80, 10)
    protocol, naive = protocol_of(dealt, 40)
    lost = {i for images in naive[7] for i in images}
    kept = torch.tensor([i not in lost for i in range(80)])
    flags = Flags(norm=True, score=False, flip=False)
    part = (dealt.rows[kept], dealt.ids[kept])
    numbers, _ = ijb(*part, protocol, None, flags=flags, fars=FARS)
    empty = [t for t in range(40) if all(i in lost for images in naive[t] for i in images)]
    expected = int(np.isin(protocol.pairs, empty).any(axis=1).sum())
    assert numbers["num_ijb_left_out"] == expected > 0
    nothing = (dealt.rows[:0], dealt.ids[:0])
    with pytest.raises(DataError, match="meta: 0 of the 0 pairs with images are genuine"):
        ijb(*nothing, protocol, None, flags=flags, fars=FARS)


def test_a_replicate_is_the_table_of_the_templates_drawn():
    """Draw the templates, write every pair as often as both were drawn, count plainly."""
    rng = np.random.default_rng(0)
    num_templates = 12
    pairs = rng.integers(0, num_templates, (150, 2))
    same = rng.random(150) < 0.4
    cosines = np.round(rng.normal(0.3 * same, 0.2), 2)
    cosines[3] = np.nan
    tars = bootstrap_tars(
        Scored(cosines, same, pairs),
        None,
        torch.device("cpu"),
        fars=FARS,
        num_replicates=20,
        seed=9,
    )
    assert len(tars) == 20 and len(np.unique(tars[:, 2])) > 10
    for replicate in range(20):
        drawn = np.random.Generator(np.random.Philox(key=[9, replicate])).integers(
            0, num_templates, num_templates
        )
        times = np.bincount(drawn, minlength=num_templates)
        repeated = np.repeat(np.arange(150), times[pairs].prod(axis=1))
        roc = Roc.of(cosines[repeated], same[repeated])
        assert tars[replicate].tolist() == [roc.tar_at_far(far).tar for far in FARS]
