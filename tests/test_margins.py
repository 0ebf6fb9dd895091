"""Margins against the dense oracle, finite differences, other people's losses, and their ends."""

import json
import math
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from margin_oracles import MarginOracle, key, normal
from ranks import run_ranks

from data.order import derive_key
from trainer.centers.margins import Targets, build_margin
from trainer.centers.margins.draws import deal, derive_keys, draw_normal
from trainer.centers.margins.fixed import Combined
from trainer.collectives import gather_counts, gather_rows, own_rank
from trainer.config import CENTER_LOSSES, ConfigError, LossConfig

EXACT = 1e-10
ANGULAR = [
    "arcface",
    "combined",
    "sphereface",
    "elastic_arcface",
    "elastic_arcface_plus",
    "adaface",
    "magface",
    "curricularface",
]
CARRIED = {"adaface": ("norm_mean", "norm_std"), "curricularface": ("t",)}


def config_of(name, **options):
    return LossConfig(name=name, **options)


def build(name, **options):
    return build_margin(config_of(name, **options))


def targets_of(cosines, norms=None, ids=None, step=3):
    cosines = torch.as_tensor(cosines)
    norms = torch.full_like(cosines, 20.0) if norms is None else norms
    ids = torch.arange(len(cosines)) if ids is None else ids
    return Targets(cosines, norms, ids, step)


@dataclass
class Case:
    name: str
    options: dict = field(default_factory=dict)
    seed: int = 0
    count: int = 19
    classes: int = 13

    def inputs(self):
        draw = torch.Generator().manual_seed(self.seed)
        cosines = torch.rand(self.count, self.classes, generator=draw, dtype=torch.float64)
        cosines = cosines * 1.96 - 0.98
        labels = torch.randint(0, self.classes, (self.count,), generator=draw)
        # Targets from nearly opposite to nearly equal: on both sides of every threshold.
        ends = 1 - 1.99 * torch.linspace(1, 0.05, self.count, dtype=torch.float64) ** 2
        ends[1:2] = -0.95
        cosines[torch.arange(self.count), labels] = ends[torch.randperm(self.count, generator=draw)]
        norms = torch.rand(self.count, generator=draw, dtype=torch.float64) * 130 + 1
        ids = torch.randint(0, 2**62, (self.count,), generator=draw)
        return cosines, labels, norms, ids


def ours(margin, cosines, labels, norms, ids, step, tile=(5, 7)):
    """Losses and gradients of their mean, put together from tiles by hand."""
    count, rows = len(labels), torch.arange(len(labels))
    margined = margin.prepare(Targets(cosines[rows, labels], norms, ids, step), training=True)
    logits = cosines.T.contiguous()
    slopes = torch.empty_like(logits)
    for first in range(0, cosines.shape[1], tile[0]):
        for start in range(0, count, tile[1]):
            columns = slice(start, min(start + tile[1], count))
            block = logits[first : first + tile[0], columns]
            found = margined.negatives(block, columns)
            slopes[first : first + tile[0], columns] = margin.scale if found is None else found
    logits, slopes = logits.T, slopes.T
    logits[rows, labels], slopes[rows, labels] = margined.logits, margined.slopes
    if margin.normalised:
        losses = logits.logsumexp(1) - margined.logits
        weights = logits.softmax(1)
        weights[rows, labels] -= 1
    else:
        losses = logits.sum(1) - 2 * margined.logits
        weights = torch.ones_like(logits)
        weights[rows, labels] = -1
    by_norm = torch.zeros_like(norms)
    if margined.norm_slopes is not None:
        by_norm += weights[rows, labels] * margined.norm_slopes
    if margined.penalty is not None:
        losses = losses + margined.penalty
        by_norm += margined.penalty_slopes
    return losses, weights * slopes / count, by_norm / count


def theirs(oracle, cosines, labels, norms, ids, step):
    cosines, norms = cosines.clone().requires_grad_(), norms.clone().requires_grad_()
    losses = oracle.losses(cosines, labels, norms, ids, step)
    by_cosine, by_norm = torch.autograd.grad(losses.mean(), [cosines, norms], allow_unused=True)
    return losses.detach(), by_cosine, torch.zeros_like(norms) if by_norm is None else by_norm


def variants(name):
    """Options under which a loss is compared and differentiated."""
    options = [{}]
    if name in ANGULAR:
        options += [{"gradient": "detached"}, {"beyond_pi": "none"}, {"beyond_pi": "monotonic"}]
        options += [] if name == "adaface" else [{"beyond_pi": "easy"}]
    if name == "combined":
        options += [{"margins": m} for m in ((0.9, 0.4, 0.15), (1.6, 0.3, 0.0), (1.0, 0.5, 0.35))]
    if name == "sphereface":
        options += [{"margin": 4.0}, {"margin": 4.0, "sphereface_annealing": (1000.0, 0.12, 5.0)}]
    if name == "adaface":
        options += [{"adaface_momentum": 1.0, "adaface_h": 0.9, "margin": 0.6}]
    if name == "magface":
        options += [{"gradient": "detached", "beyond_pi": "monotonic", "magface_weight": 3.0}]
    if name == "curricularface":
        options += [{"curricular_momentum": 0.9, "margin": 0.3, "filter": "zero"}]
    if name.startswith("elastic"):
        options += [{"margin_std": 0.3, "margin": 0.2}]
    return options


CASES = [Case(name, options) for name in CENTER_LOSSES for options in variants(name)]
CASES += [
    Case(name, {"filter": mode, "filter_threshold": 0.3})
    for name in ("arcface", "curricularface", "magface", "sface")
    for mode in ("drop", "zero")
]


# ------------------------------------------------------------------------------- the oracle


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_oracle(case):
    margin = build(case.name, **case.options)
    oracle = MarginOracle(case.name, **case.options)
    for step in range(3):  # the statistics move
        case.seed = step
        inputs = (*case.inputs(), 7 * step)
        expected = theirs(oracle, *inputs)
        actual = ours(margin, *inputs)
        for what, x, y in zip(("losses", "by cosine", "by norm"), actual, expected, strict=True):
            error = (x - y).abs().max().item()
            assert error <= EXACT * max(1.0, y.abs().max().item()), f"{what} is off by {error}"
    for name in CARRIED.get(case.name, ()):
        assert margin.state()[name] == pytest.approx(oracle.state[name], abs=1e-13)


@settings(max_examples=120, deadline=None)
@given(
    name=st.sampled_from(CENTER_LOSSES),
    count=st.integers(1, 12),
    classes=st.integers(2, 9),
    seed=st.integers(0, 10**6),
    scale=st.floats(1, 100),
    mode=st.sampled_from(["none", "drop", "zero"]),
)
def test_equals_the_oracle_at_any_size(name, count, classes, seed, scale, mode):
    options = {"scale": scale, "filter": mode, "filter_threshold": 0.2}
    inputs = (*Case(name, seed=seed, count=count, classes=classes).inputs(), seed)
    expected = theirs(MarginOracle(name, **options), *inputs)
    for x, y in zip(ours(build(name, **options), *inputs), expected, strict=True):
        assert (x - y).abs().max() <= EXACT * max(1.0, y.abs().max().item())


@pytest.mark.parametrize("name", CENTER_LOSSES)
def test_float32_follows_float64(name):
    cosines, labels, norms, ids = Case(name, {}).inputs()
    wide = ours(build(name), cosines, labels, norms, ids, 1)
    narrow = ours(build(name), cosines.float(), labels, norms.float(), ids, 1)
    for x, y in zip(narrow, wide, strict=True):
        assert x.dtype == torch.float32
        assert (x - y).abs().max() <= 3e-5 * max(1.0, y.abs().max().item())


def test_special_cases_meet():
    targets = targets_of(torch.linspace(-1, 1, 41, dtype=torch.float64))
    pairs = [
        (build("combined", margins=(1.0, 0.0, 0.0)), build("softmax")),
        (build("combined", margins=(1.0, 0.0, 0.35)), build("cosface")),
        (build("combined", margins=(1.0, 0.5, 0.0)), build("arcface")),
        (build("elastic_arcface", margin_std=0.0), build("arcface")),
        (build("elastic_arcface_plus", margin_std=0.0), build("arcface")),
        (build("elastic_cosface_plus", margin_std=0.0), build("cosface")),
        (build("sphereface", margin=1.0), build("softmax")),
        (build("magface", magface_margins=(0.5, 0.5), beyond_pi="monotonic"), build("arcface")),
    ]
    for one, other in pairs:
        a, b = (m.prepare(targets, training=True) for m in (one, other))
        torch.testing.assert_close(a.logits, b.logits, atol=1e-12, rtol=0)
        torch.testing.assert_close(a.slopes, b.slopes, atol=1e-12, rtol=1e-12)
    for one, other in pairs[3:6]:  # bit for bit
        a, b = (m.prepare(targets, training=True) for m in (one, other))
        assert torch.equal(a.logits, b.logits) and torch.equal(a.slopes, b.slopes)


@pytest.mark.parametrize("name", ["arcface", "cosface"])
def test_equals_pytorch_metric_learning(name):
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    draw = torch.Generator().manual_seed(2)
    embeddings = torch.randn(16, 8, generator=draw, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 6, (16,), generator=draw)
    peer = {
        "arcface": lambda: losses.ArcFaceLoss(6, 8, margin=math.degrees(0.5), scale=64),
        "cosface": lambda: losses.CosFaceLoss(6, 8, margin=0.35, scale=64),
    }[name]().double()
    expected = peer(embeddings, labels)
    (gradient,) = torch.autograd.grad(expected, embeddings)
    cosines = F.normalize(embeddings, dim=1) @ F.normalize(peer.W.detach(), dim=0)
    norms, ids = embeddings.detach().norm(dim=1), torch.arange(16)
    value, by_cosine, _ = ours(build(name), cosines.detach(), labels, norms, ids, 0)
    cosines.backward(by_cosine)
    assert value.mean().item() == pytest.approx(expected.item(), abs=1e-9)
    torch.testing.assert_close(embeddings.grad, gradient, atol=1e-7, rtol=1e-6)


# ------------------------------------------------------------------------------- slopes


def differences(margin, cosines, norms, h=1e-6):
    """Central differences of the targets' logits by cosine, by norm, and of the penalty."""

    def at(shift_cosines, shift_norms):
        targets = targets_of(cosines + shift_cosines, norms + shift_norms)
        return margin.prepare(targets, training=False)

    by_cosine = (at(h, 0).logits - at(-h, 0).logits) / (2 * h)
    up, down = at(0, h), at(0, -h)
    by_norm = (up.logits - down.logits) / (2 * h)
    penalty = None if up.penalty is None else (up.penalty - down.penalty) / (2 * h)
    return by_cosine, by_norm, penalty


@pytest.mark.parametrize(
    "name, options",
    [(n, o) for n in CENTER_LOSSES if n != "sface" for o in variants(n) if "gradient" not in o],
    ids=str,
)
def test_slopes_are_finite_differences(name, options):
    draw = torch.Generator().manual_seed(5)
    cosines = torch.rand(400, generator=draw, dtype=torch.float64) * 1.98 - 0.99
    norms = torch.rand(400, generator=draw, dtype=torch.float64) * 128 + 1
    margin = build(name, **options)
    margined = margin.prepare(targets_of(cosines, norms), training=False)
    by_cosine, by_norm, penalty = differences(margin, cosines, norms)
    # A difference over a corner is neither side's slope; there are at most a few.
    smooth = (by_cosine - margined.slopes).abs() <= 1e-5 * margined.slopes.abs().clamp(min=1)
    assert smooth.sum() >= 398
    if margined.norm_slopes is None:
        if name != "adaface":  # whose norms are seen and get no gradient
            assert by_norm.abs().max() == 0
        return
    torch.testing.assert_close(margined.norm_slopes, by_norm, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(margined.penalty_slopes, penalty, atol=1e-6, rtol=1e-5)
    assert (margined.norm_slopes != 0).sum() > 100 and (margined.penalty_slopes != 0).sum() > 100


@pytest.mark.parametrize("name", ANGULAR)
def test_detached_is_straight_through(name):
    targets = targets_of(torch.linspace(-1, 1, 101, dtype=torch.float64))
    analytic = build(name).prepare(targets, training=True)
    detached = build(name, gradient="detached").prepare(targets, training=True)
    assert torch.equal(detached.logits, analytic.logits)
    assert (detached.slopes == 64).all() and not torch.equal(analytic.slopes, detached.slopes)
    if analytic.norm_slopes is not None:
        assert torch.equal(detached.norm_slopes, analytic.norm_slopes)


def test_curricular_negatives_are_finite_differences():
    margin = build("curricularface")
    margin.load({"t": 0.4})
    margined = margin.prepare(targets_of(torch.tensor([0.1, 0.6, 0.95]).double()), training=False)
    cosines, h = torch.linspace(-0.99, 0.99, 303).double().view(101, 3), 1e-6

    def logits(shift):
        table = cosines + shift
        return table, margined.negatives(table, slice(0, 3))

    (up, _), (down, _), (here, slopes) = logits(h), logits(-h), logits(0.0)
    smooth = ((up - down) / (2 * h) - slopes).abs() <= 1e-5 * slopes.abs().clamp(min=1)
    assert smooth.sum() >= 300
    limits = torch.cos(torch.tensor([0.1, 0.6, 0.95]).double().acos() + 0.5)
    hard = cosines > limits
    assert hard.any() and not hard.all()
    torch.testing.assert_close(here, 64 * torch.where(hard, cosines * (0.4 + cosines), cosines))


def test_sface_weights_have_no_gradient():
    cosines = torch.linspace(-1, 1, 201).double()
    margined = build("sface").prepare(targets_of(cosines), training=True)
    torch.testing.assert_close(margined.logits, margined.slopes * cosines)
    expected = 64 * torch.sigmoid(80 * (cosines.acos() - 0.8))
    torch.testing.assert_close(margined.slopes, expected)
    table = cosines.clone().view(-1, 1)
    slopes = margined.negatives(table, slice(0, 1))
    torch.testing.assert_close(table, slopes * cosines.view(-1, 1))
    torch.testing.assert_close(slopes.squeeze(1), 64 * torch.sigmoid(80 * (1.23 - cosines.acos())))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", CENTER_LOSSES)
def test_slopes_are_bounded_at_the_ends(name, dtype):
    near = [1.0, 1.0000001, 1 + 1e-4, 1 - 6e-8, 1 - 1e-12, 1 - 1e-6]
    cosines = torch.tensor(near + [-x for x in near], dtype=dtype)
    norms = torch.tensor([1e-20, 5.0, 20.0, 90.0, 110.0, 1e6] * 2, dtype=dtype)
    for options in variants(name):
        margin = build(name, **options)
        margined = margin.prepare(targets_of(cosines, norms), training=True)
        table = cosines.repeat(3, 1)
        slopes = margined.negatives(table, slice(0, len(cosines)))
        factor = options.get("margin", 1.7) if name == "sphereface" else 1.6
        for values in margined[:5]:
            assert values is None or (values.isfinite().all() and values.dtype == dtype)
        assert margined.slopes.abs().max() <= 64 * factor / math.sin(1e-3)
        assert table.isfinite().all() and table.abs().max() <= 64 * 2.01
        assert slopes is None or slopes.isfinite().all()
        # Rounding beyond 1 is 1.
        clamped = build(name, **options).prepare(
            targets_of(cosines.clamp(-1, 1), norms), training=True
        )
        assert torch.equal(margined.slopes, clamped.slopes)
        assert torch.equal(margined.logits, clamped.logits)


def test_slopes_near_one_are_the_limit():
    """m^2 for a multiplied angle; 0/0 is not 0."""
    margined = build("sphereface").prepare(targets_of(torch.ones(1).double()), training=True)
    assert margined.slopes.item() == pytest.approx(64 * 1.7**2, rel=1e-5)
    margined = build("arcface").prepare(targets_of(torch.ones(1).double()), training=True)
    assert margined.logits.item() == pytest.approx(64 * math.cos(0.5), abs=1e-12)
    assert margined.slopes.item() == pytest.approx(64 * math.sin(0.501) / math.sin(1e-3))


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from([n for n in CENTER_LOSSES if n != "sface"]),
    m1=st.floats(0.5, 2.0),
    m2=st.floats(0.0, 1.5),
    norm=st.floats(0.01, 200),
)
def test_monotonic_targets_never_rise_with_the_angle(name, m1, m2, norm):
    options = {"beyond_pi": "monotonic"} if name in ANGULAR else {}
    options |= {"margins": (m1, m2, 0.1)} if name == "combined" else {}
    options |= {"margin": max(1.0, m1 * 3)} if name == "sphereface" else {}
    options |= {"margin_std": 0.0} if name.startswith("elastic") else {}
    if name in ("arcface", "adaface", "curricularface"):
        options |= {"margin": m2}
    cosines = torch.linspace(1, -1, 2001, dtype=torch.float64)
    targets = targets_of(cosines, torch.full_like(cosines, norm))
    margined = build(name, **options).prepare(targets, training=True)
    assert margined.logits.diff().max() <= 1e-9 and margined.slopes.min() >= -1e-9


def test_combined_margins_are_refused_where_they_would_rise():
    cosines = torch.linspace(1, -1, 4001, dtype=torch.float64)
    refused = []
    for m1 in np.linspace(0.25, 6, 24):
        for m2 in np.linspace(0, 1.5, 7):
            margins = (float(m1), float(m2), 0.0)
            family = Combined(*margins, "monotonic")
            rises = family.bend(targets_of(cosines)).cosines.diff().max() > 1e-9
            try:
                build("combined", margins=margins)
                refused.append(False)
            except ConfigError:
                refused.append(True)
            assert refused[-1] == rises, margins
    assert any(refused) and not all(refused)


def test_nothing_is_part_of_a_graph():
    cosines = torch.rand(5, requires_grad=True)
    norms = torch.rand(5, requires_grad=True)
    for name in CENTER_LOSSES:
        margined = build(name).prepare(targets_of(cosines, norms), training=True)
        assert not any(x.requires_grad for x in margined[:5] if x is not None)


# ------------------------------------------------------------------------------- filter


@pytest.mark.parametrize("name", ["softmax", "curricularface", "sface"])
@pytest.mark.parametrize("mode", ["drop", "zero"])
def test_filtered_negatives(name, mode):
    margin = build(name, filter=mode, filter_threshold=0.4)
    margined = margin.prepare(targets_of(torch.full((4,), 0.2)), training=True)
    cosines = torch.linspace(-1, 1, 44).view(11, 4)
    table, plain = cosines.clone(), cosines.clone()
    slopes = margined.negatives(table, slice(0, 4))
    plain_slopes = (
        build(name)
        .prepare(targets_of(torch.full((4,), 0.2)), training=True)
        .negatives(plain, slice(0, 4))
    )
    out = cosines > 0.4
    assert (table[out] == (-torch.inf if mode == "drop" and name != "sface" else 0.0)).all()
    assert torch.equal(table[~out], plain[~out])
    if slopes is not None:  # else it is `scale`, and does not matter where the logit is -inf
        assert (slopes[out] == 0).all()
        expected = torch.full_like(table, 64.0) if plain_slopes is None else plain_slopes
        assert torch.equal(slopes[~out], expected[~out])
    else:
        assert mode == "drop" and plain_slopes is None


# ------------------------------------------------------------------------------- statistics


def test_adaface_follows_the_global_batch():
    margin = build("adaface", adaface_momentum=0.25)
    assert margin.state() == {"norm_mean": 20.0, "norm_std": 100.0}
    norms = torch.tensor([10.0, 20.0, 60.0, 4000.0]).double()
    targets = targets_of(torch.rand(4).double(), norms)
    margin.prepare(targets, training=False)
    assert margin.state() == {"norm_mean": 20.0, "norm_std": 100.0}
    margin.prepare(targets, training=True)
    clipped = np.array([10.0, 20.0, 60.0, 100.0])
    moved = {
        "norm_mean": 0.25 * clipped.mean() + 0.75 * 20,
        "norm_std": 0.25 * clipped.std(ddof=1) + 0.75 * 100,
    }
    assert margin.state() == pytest.approx(moved, abs=1e-12)
    margined = margin.prepare(targets_of(torch.rand(1).double(), norms[:1]), training=True)
    assert margined.logits.isfinite().all()
    assert margin.state()["norm_std"] == pytest.approx(moved["norm_std"], abs=1e-12)
    assert margin.state()["norm_mean"] < moved["norm_mean"]


def test_adaface_has_no_slope_beyond_its_published_bounds():
    margin = build("adaface", adaface_h=1.0)
    margin.load({"norm_mean": 20.0, "norm_std": 10.0})
    # Cosines beyond 1 - 1e-3, then angles that the margin of a long embedding takes below 1e-3.
    cosines = torch.tensor([0.9995, -0.9995, 0.998, 0.95, 0.9, 0.95]).double()
    norms = torch.tensor([10.0, 10.0, 10.0, 30.0, 30.0, 10.0]).double()
    slopes = margin.prepare(targets_of(cosines, norms), training=False).slopes
    assert (slopes == 0).tolist() == [True, True, False, True, False, False]
    free = build("adaface", adaface_h=1.0, beyond_pi="none")
    free.load(margin.state())
    assert (free.prepare(targets_of(cosines, norms), training=False).slopes != 0).all()


@pytest.mark.parametrize("name", sorted(CARRIED))
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_statistics_stay_when_a_batch_is_not_finite_or_empty(name, bad):
    margin = build(name)
    margin.prepare(targets_of(torch.rand(8), torch.rand(8) * 40), training=True)
    before = margin.state()
    for place in ("cosines", "norms"):
        values = {"cosines": torch.rand(8), "norms": torch.rand(8) * 40}
        values[place][3] = bad
        margin.prepare(targets_of(**values), training=True)
        assert margin.state() == before
    margin.prepare(targets_of(torch.rand(0)), training=True)
    assert margin.state() == before


@pytest.mark.parametrize("name", CENTER_LOSSES)
def test_state_goes_through_a_file_and_back(name):
    one, other = build(name), build(name)
    for step in range(3):
        inputs = Case(name, {}, seed=step).inputs()
        ours(one, *inputs, step)
    other.load(json.loads(json.dumps(one.state())))
    assert set(one.state()) == set(CARRIED.get(name, ()))
    inputs = (*Case(name, {}, seed=9).inputs(), 9)
    for x, y in zip(ours(one, *inputs), ours(other, *inputs), strict=True):
        assert torch.equal(x, y)


def test_state_of_another_loss_is_refused():
    with pytest.raises(ConfigError, match="carries t, this one norm_mean, norm_std"):
        build("adaface").load(build("curricularface").state())
    with pytest.raises(ConfigError, match="carries nothing, this one t"):
        build("curricularface").load({})
    with pytest.raises(ConfigError, match="t = nan"):
        build("curricularface").load({"t": math.nan})


def test_no_rows_at_all():
    for name in CENTER_LOSSES:
        margined = build(name).prepare(targets_of(torch.rand(0)), training=True)
        assert margined.logits.shape == (0,)
        table = torch.rand(3, 0)
        margined.negatives(table, slice(0, 0))


# ------------------------------------------------------------------------------- draws


def test_draws_are_keyed_and_normal():
    ids = torch.tensor([0, 1, 5, 2**40, 2**62, 123456789])
    for seed, step in ((0, 0), (0, 1), (7, 10**6)):
        drawn = draw_normal(ids, seed=seed, step=step)
        expected = [normal(seed, step, i) for i in ids.tolist()]
        assert drawn.tolist() == pytest.approx(expected, abs=1e-12)
        keys = derive_keys(seed, 18, step, ids)
        assert np.array_equal(keys.numpy().view(np.uint64), derive_key(seed, 18, step, ids.numpy()))
        assert [k % 2**64 for k in keys.tolist()] == [key(seed, 18, step, i) for i in ids.tolist()]
    many = draw_normal(torch.arange(200_000), seed=0, step=3)
    assert abs(many.mean()) < 0.01 and abs(many.std() - 1) < 0.01
    inside = [(many.abs() < x).double().mean().item() for x in (0.5, 1.0, 2.0, 3.0)]
    assert inside == pytest.approx([0.38292, 0.68269, 0.9545, 0.9973], abs=0.004)
    following = draw_normal(torch.arange(200_000), seed=0, step=4)
    assert abs((many * following).mean()) < 0.01 and abs((many[1:] * many[:-1]).mean()) < 0.01


@settings(max_examples=50, deadline=None)
@given(count=st.integers(0, 30), seed=st.integers(0, 10**6), levels=st.integers(1, 30))
def test_plus_deals_the_smallest_margin_to_the_largest_cosine(count, seed, levels):
    draw = torch.Generator().manual_seed(seed)
    cosines = torch.randint(0, levels, (count,), generator=draw).double() / 30  # ties
    ids = torch.randperm(10 * count + 1, generator=draw)[:count]
    margins = torch.randn(count, generator=draw).double()
    dealt = deal(margins, cosines, ids)
    assert torch.equal(dealt.sort().values, margins.sort().values)
    nearest = sorted(range(count), key=lambda i: (-cosines[i].item(), ids[i].item()))
    assert dealt[nearest].tolist() == margins.sort().values.tolist()


@pytest.mark.parametrize("name", CENTER_LOSSES)
def test_order_of_the_batch_does_not_matter(name):
    cosines, labels, norms, ids = Case(name, {}).inputs()
    own = cosines[torch.arange(len(labels)), labels]
    order = torch.randperm(len(own), generator=torch.Generator().manual_seed(1))
    one = build(name).prepare(Targets(own, norms, ids, 4), training=True)
    other = build(name).prepare(Targets(own[order], norms[order], ids[order], 4), training=True)
    # Means are of numbers in another order.
    torch.testing.assert_close(other.logits, one.logits[order], atol=1e-11, rtol=0)
    torch.testing.assert_close(other.slopes, one.slopes[order], atol=1e-11, rtol=1e-12)
    later = build(name).prepare(Targets(own, norms, ids, 5), training=True)
    assert torch.equal(later.logits, one.logits) == (not name.startswith("elastic"))


_COUNTS = [5, 0, 9]


def _prepare_gathered(group, names):
    """Logits, slopes and state of each loss from this rank's rows and those of all others."""
    results = {}
    for name in names:
        cosines, labels, norms, ids = Case(name, {}, count=sum(_COUNTS)).inputs()
        known = [cosines[torch.arange(len(labels)), labels], norms, ids]
        if group is not None:
            rank = own_rank(group)
            counts = gather_counts(_COUNTS[rank], group, torch.device("cpu"))
            known = [gather_rows(x.split(_COUNTS)[rank], counts, group) for x in known]
        margin = build(name)
        margined = margin.prepare(Targets(*known, 2), training=True)
        results[name] = margined.logits, margined.slopes, margin.state()
    return results


def test_every_rank_finds_the_same_bits():
    names = ("elastic_arcface_plus", "elastic_cosface", "adaface", "curricularface", "magface")
    alone = _prepare_gathered(None, names)
    for result in run_ranks(3, _prepare_gathered, names):
        for name in names:
            assert torch.equal(result[name][0], alone[name][0])
            assert torch.equal(result[name][1], alone[name][1])
            assert result[name][2] == alone[name][2]


# ------------------------------------------------------------------------------- options


BAD = [
    ({"name": "clip"}, "loss.name = 'clip' has no class centers: choose softmax"),
    (
        {"name": "softmax", "margin": 0.3},
        "loss.margin = 0.3: loss.name = 'softmax' does not read it",
    ),
    ({"name": "cosface", "gradient": "detached"}, "loss.gradient = 'detached'"),
    ({"name": "sface", "beyond_pi": "none"}, "loss.beyond_pi = 'none'"),
    (
        {"name": "arcface", "margins": (1.0, 0.5, 0.1)},
        "options of arcface: beyond_pi, gradient, mar",
    ),
    ({"name": "arcface", "label_smoothing": 0.1}, "loss.label_smoothing = 0.1"),
    (
        {"name": "arcface", "margin": 28.6},
        "loss.margin = 28.6: arcface takes a margin in radians in",
    ),
    ({"name": "arcface", "margin": -0.1}, "in \\[0, 1.571\\]; published is 0.5"),
    ({"name": "arcface", "margin": math.nan}, "loss.margin = nan"),
    ({"name": "arcface", "scale": math.inf}, "loss.scale = inf"),
    ({"name": "cosface", "margin": 35.0}, "loss.margin = 35.0"),
    ({"name": "sphereface", "margin": 0.9}, "takes a margin in \\[1, 10\\]"),
    ({"name": "sphereface", "margin": 4.0, "beyond_pi": "easy"}, "choose at most 2"),
    ({"name": "sphereface", "sphereface_annealing": (1.0, -1.0, 5.0)}, "sphereface_annealing"),
    ({"name": "combined", "margins": (0.0, 0.3, 0.2)}, "m1 in \\(0, 10\\]"),
    ({"name": "combined", "margins": (5.0, 0.0, 0.0)}, 'loss.name = "sphereface"'),
    ({"name": "combined", "margins": (1.8, 0.5, 0.0), "beyond_pi": "easy"}, "choose smaller ones"),
    ({"name": "elastic_arcface", "margin_std": -1.0}, "loss.margin_std = -1.0"),
    ({"name": "adaface", "beyond_pi": "easy"}, '"monotonic" \\(as published\\) or "none"'),
    ({"name": "adaface", "curricular_momentum": 0.5}, "loss.curricular_momentum = 0.5"),
    ({"name": "magface", "margin": 0.5}, "loss.margin = 0.5"),
    ({"name": "magface", "magface_norms": (110.0, 10.0)}, "ends of a range above 0"),
    ({"name": "magface", "magface_margins": (0.8, 0.45)}, "rising"),
    ({"name": "sface", "sface": (80.0, 0.8, 4.0)}, "radians in \\[0, pi\\]"),
]


@pytest.mark.parametrize("options, text", BAD, ids=lambda x: str(x)[:60])
def test_options_that_do_not_fit(options, text):
    with pytest.raises(ConfigError, match=text):
        build(**options)


def test_published_defaults():
    targets = targets_of(torch.tensor([0.5]).double())
    expected = {
        "softmax": 0.5,
        "cosface": 0.5 - 0.35,
        "arcface": math.cos(math.pi / 3 + 0.5),
        "combined": math.cos(math.pi / 3 + 0.3) - 0.2,
        "sphereface": math.cos(1.7 * math.pi / 3),
        "curricularface": math.cos(math.pi / 3 + 0.5),
        "magface": math.cos(math.pi / 3 + 0.45 + 0.35 * 0.1),
        "sface": 0.5 / (1 + math.exp(-80 * (math.pi / 3 - 0.8))),
    }
    for name, value in expected.items():
        margined = build(name).prepare(targets, training=True)
        assert margined.logits.item() == pytest.approx(64 * value, abs=1e-12), name
