"""Every loss against the naive float64 oracle, value and gradients, and against other people's."""

import importlib.util
import sys
from dataclasses import dataclass, field, replace
from functools import cache

import oracles
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import run_ranks

from trainer.losses import (
    clip_loss,
    multi_similarity_loss,
    siglip_loss,
    supcon_loss,
)
from trainer.similarity import pairs as engine

EXACT = 1e-10
OURS = {
    "clip": clip_loss,
    "siglip": siglip_loss,
    "supcon": supcon_loss,
    "multi_similarity": multi_similarity_loss,
}
ORACLES = {name: getattr(oracles, name) for name in OURS}
# What of a case is differentiated, in the order of the arguments.
INPUTS = {
    "clip": ("images", "texts", "scale"),
    "siglip": ("images", "texts", "scale", "bias"),
    "supcon": ("images", "scale"),
    "multi_similarity": ("images",),
}
BY_ROW = ("images", "texts", "ids", "caption_ids", "labels")


@dataclass
class Case:
    """Inputs of a loss for the global batch, and options of ours beside those of the oracle."""

    loss: str
    count: int = 23
    dim: int = 7
    seed: int = 0
    options: dict = field(default_factory=dict)
    ours: dict = field(default_factory=dict)
    with_ids: tuple[str, ...] = ()
    scale: float = 9.0

    def inputs(self, rows=slice(None)):
        draw = torch.Generator().manual_seed(self.seed)
        embeddings = torch.randn(2, self.count, self.dim, generator=draw, dtype=torch.float64)
        images, texts = F.normalize(embeddings, dim=-1)
        repeated = torch.randint(0, max(self.count // 2, 1), (2, self.count), generator=draw)
        labels = torch.randint(0, max(self.count // 4, 1), (self.count,), generator=draw)
        known = {
            "images": images,
            "texts": texts,
            "scale": torch.tensor(self.scale, dtype=torch.float64),
            "bias": torch.tensor(-4.0, dtype=torch.float64),
            "ids": repeated[0],
            "caption_ids": repeated[1] * 2**40,
            "labels": labels,
        }
        return {k: v[rows].clone() if k in BY_ROW else v for k, v in known.items()}


def evaluate(loss, case, known, options, group=()):
    """Value and gradients of a loss of ours or an oracle."""
    inputs = [known[name].requires_grad_() for name in INPUTS[case.loss]]
    labels = [known["labels"]] if case.loss in ("supcon", "multi_similarity") else []
    options = {**options, **{name: known[name] for name in case.with_ids}}
    value = loss(inputs[0], *labels, *inputs[1:], *group, **options)
    gradients = torch.autograd.grad(value, inputs)
    return value.detach(), list(gradients)


def expected_of(case):
    return evaluate(ORACLES[case.loss], case, case.inputs(), case.options)


def assert_close(case, actual, expected, tolerance=EXACT):
    names = ("value", *INPUTS[case.loss])
    for name, x, y in zip(names, [actual[0], *actual[1]], [expected[0], *expected[1]], strict=True):
        assert x.shape == y.shape and x.isfinite().all(), (case, name)
        error = (x.double() - y).abs().max().item() if y.numel() else 0.0
        assert error <= tolerance * max(1.0, y.abs().max().item() if y.numel() else 0.0), (
            f"{case}: {name} is off by {error}"
        )


MASKS = {
    "clip": [(), ("ids",), ("ids", "caption_ids")],
    "siglip": [(), ("ids",), ("ids", "caption_ids")],
    "supcon": [(), ("ids",)],
    "multi_similarity": [(), ("ids",)],
}
OPTIONS = {
    "clip": [{}, {"label_smoothing": 0.1}],
    "siglip": [{}],
    "supcon": [{}],
    "multi_similarity": [{}, {"epsilon": float("inf")}, {"alpha": 3.0, "threshold": 0.3}],
}
CASES = [
    Case(loss, options=options, with_ids=masks)
    for loss in OURS
    for options in OPTIONS[loss]
    for masks in MASKS[loss]
] + [Case("clip", with_ids=("ids",), scale=2000.0)]  # two exponentials even in float64


# ------------------------------------------------------------------------------- one process


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("tile", [1, 4, 23, None])
def test_equals_the_oracle_at_any_tile(case, tile):
    actual = evaluate(OURS[case.loss], case, case.inputs(), {**case.options, "tile": tile})
    assert_close(case, actual, expected_of(case))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_oracle_when_few_tiles_are_kept(case, monkeypatch):
    monkeypatch.setattr("trainer.similarity.pairs._KEPT_ELEMENTS", 0)
    monkeypatch.setattr("trainer.similarity.pairs._KEPT_OF_ROWS", 0.3)
    actual = evaluate(OURS[case.loss], case, case.inputs(), {**case.options, "tile": 4})
    assert_close(case, actual, expected_of(case))


@pytest.mark.parametrize("loss", OURS)
@pytest.mark.parametrize(("count", "dim"), [(1, 5), (2, 1), (3, 130), (65, 3)])
def test_equals_the_oracle_at_any_shape(loss, count, dim):
    case = Case(loss, count, dim)
    actual = evaluate(OURS[loss], case, case.inputs(), {"tile": 16})
    assert_close(case, actual, expected_of(case))


@pytest.mark.parametrize("loss", OURS)
def test_without_any_rows_the_loss_is_zero(loss):
    case = Case(loss, count=0)
    value, gradients = evaluate(OURS[loss], case, case.inputs(), {})
    assert value == 0 and all((g == 0).all() for g in gradients)


ROWS = {
    "identical": lambda x: x[:1].expand_as(x).contiguous(),
    "opposite": lambda x: x[:1] * torch.tensor([1.0, -1.0]).repeat(len(x))[: len(x), None],
}


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("loss", OURS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_finite_and_right_at_scale_100_and_degenerate_rows(kind, loss, dtype, sign):
    case = Case(loss, options={"epsilon": float("inf")} if loss == "multi_similarity" else {})
    known = case.inputs()
    # Rows that every dtype holds exactly: what is compared is the arithmetic, not the rounding.
    rows = ROWS[kind](known["images"]).bfloat16().to(torch.float16)
    known |= {"images": rows.to(dtype), "texts": (rows * sign).to(dtype)}
    at_least_float32 = torch.promote_types(dtype, torch.float32)
    known["scale"] = torch.tensor([100.0], dtype=at_least_float32)
    known["bias"] = torch.tensor([-10.0], dtype=at_least_float32)
    exact = {k: v.double() if v.is_floating_point() else v for k, v in known.items()}
    actual = evaluate(OURS[loss], case, known, {"tile": 5, **case.options})
    assert all(x.dtype == known[n].dtype for x, n in zip(actual[1], INPUTS[loss], strict=True))
    expected = evaluate(ORACLES[loss], case, exact, case.options)
    expected = expected[0].reshape(()), expected[1]
    close = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
    assert_close(case, actual, expected, close[dtype])
    assert (actual[0].double() - expected[0]).abs() <= 2e-5 * max(1.0, expected[0].item())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("loss", OURS)
def test_low_precision_rows_have_float32_statistics(loss, dtype):
    case = Case(loss, count=40, dim=64, options={"epsilon": 9.0} if "multi" in loss else {})
    known = case.inputs()
    for name in ("images", "texts"):
        known[name] = known[name].to(dtype)
    exact = {k: v.double() if v.is_floating_point() else v for k, v in known.items()}
    value, gradients = evaluate(OURS[loss], case, known, {"tile": 16, **case.options})
    expected, exact_gradients = evaluate(ORACLES[loss], case, exact, case.options)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    for gradient, exact_gradient in zip(gradients, exact_gradients, strict=True):
        rounding = torch.finfo(gradient.dtype).eps  # only the result is rounded
        assert torch.allclose(gradient.double(), exact_gradient, rtol=rounding, atol=1e-6)


@pytest.mark.parametrize("loss", ["clip", "siglip"])
def test_when_all_other_pairs_are_excluded(loss):
    case = Case(loss, with_ids=("ids",), options={"label_smoothing": 0.2} if loss == "clip" else {})
    known = case.inputs()
    known["ids"] = torch.zeros(case.count, dtype=torch.int64)
    value, gradients = evaluate(OURS[loss], case, known, {"tile": 4, **case.options})
    if loss == "clip":
        assert value.abs() < 1e-14 and all(g.abs().max() < 1e-14 for g in gradients)
    expected = evaluate(ORACLES[loss], case, known, case.options)
    assert_close(case, (value, gradients), expected)


@pytest.mark.parametrize("loss", ["supcon", "multi_similarity"])
@pytest.mark.parametrize("kind", ["no positives", "no negatives", "duplicates only"])
def test_rows_without_pairs_add_exactly_zero(loss, kind):
    case = Case(loss, with_ids=("ids",))
    known = case.inputs()
    known["ids"] = torch.arange(case.count)
    if kind == "no positives":
        known["labels"] = torch.arange(case.count)
    elif kind == "no negatives":
        known["labels"] = torch.zeros(case.count, dtype=torch.int64)
    else:
        known["ids"] = torch.zeros(case.count, dtype=torch.int64)
    actual = evaluate(OURS[loss], case, known, {"tile": 4})
    assert_close(case, actual, evaluate(ORACLES[loss], case, known, {}))
    if (loss, kind) != ("supcon", "no negatives"):
        assert actual[0] == 0 and all((g == 0).all() for g in actual[1])


@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (0, 2), (1, 2)])
@pytest.mark.parametrize("loss", ["clip", "siglip"])
def test_only_what_needs_a_gradient_gets_one(loss, needed):
    case = Case(loss)
    expected = expected_of(case)
    known = case.inputs()
    inputs = [known[name] for name in INPUTS[loss]]
    for index in needed:
        inputs[index].requires_grad_()
    OURS[loss](*inputs, tile=5).backward()
    for index, tensor in enumerate(inputs):
        if index in needed:
            assert torch.allclose(tensor.grad, expected[1][index], rtol=0, atol=EXACT)
        else:
            assert tensor.grad is None


def test_only_the_bias_may_need_a_gradient():
    case = Case("siglip")
    known = case.inputs()
    known["bias"].requires_grad_()
    siglip_loss(*(known[name] for name in INPUTS["siglip"])).backward()
    assert known["bias"].grad.item() == pytest.approx(expected_of(case)[1][3].item(), abs=EXACT)


@pytest.mark.parametrize("case", [c for c in CASES if not c.options], ids=str)
def test_value_without_gradients(case):
    known = case.inputs()
    inputs = [known[name].requires_grad_() for name in INPUTS[case.loss]]
    labels = [known["labels"]] if case.loss in ("supcon", "multi_similarity") else []
    options = {name: known[name] for name in case.with_ids}
    with torch.no_grad():
        value = OURS[case.loss](inputs[0], *labels, *inputs[1:], tile=5, **options)
    assert not value.requires_grad
    assert value.item() == pytest.approx(expected_of(case)[0].item(), abs=EXACT)


@pytest.mark.parametrize("loss", OURS)
def test_backward_twice_inside_a_larger_graph_and_with_a_factor(loss):
    case = Case(loss)
    known = case.inputs()
    for name in INPUTS[loss]:
        known[name].requires_grad_()
    labels = [known["labels"]] if loss in ("supcon", "multi_similarity") else []
    first, *rest = [known[name] for name in INPUTS[loss]]
    value = 3 * OURS[loss](first, *labels, *rest, tile=5) + first.sum()
    value.backward(retain_graph=True)
    value.backward()
    expected = expected_of(case)
    assert torch.allclose(first.grad, 2 * (3 * expected[1][0] + 1), rtol=0, atol=1e-9)
    for tensor, gradient in zip(rest, expected[1][1:], strict=True):
        assert torch.allclose(tensor.grad, 6 * gradient, rtol=0, atol=1e-9)


def test_one_tensor_on_both_sides():
    rows = Case("clip").inputs()["images"].requires_grad_()
    scale = torch.tensor(5.0, dtype=torch.float64)
    (actual,) = torch.autograd.grad(clip_loss(rows, rows, scale, tile=4), rows)
    (expected,) = torch.autograd.grad(oracles.clip(rows, rows, scale), rows)
    assert torch.allclose(actual, expected, rtol=0, atol=EXACT)


@pytest.mark.parametrize("loss", OURS)
def test_inputs_may_lie_anyhow_in_memory_and_stay_as_they_are(loss):
    case = Case(loss)
    known = case.inputs()
    strided = dict(known)
    for name in ("images", "texts"):
        strided[name] = torch.stack([known[name].T] * 2, dim=-1)[..., 0].T
        assert not strided[name].is_contiguous()
    actual = evaluate(OURS[loss], case, strided, {"tile": 5})
    assert_close(case, actual, expected_of(case))
    assert torch.equal(strided["images"], case.inputs()["images"])


@pytest.mark.parametrize("scale", [20.0, 60.0, 80.0, 130.0, 1000.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_exponential_or_two_give_the_same(scale, dtype):
    """Around the scale at which sums of plain exponentials would leave the range of the dtype."""
    case = Case("clip", count=40, with_ids=("ids",), options={"label_smoothing": 0.1})
    known = case.inputs()
    known["images"][:3] *= -1  # rows and columns whose best logit is far below the others'
    known["texts"][:3] = -known["images"][3:6]
    known |= {name: known[name].to(dtype) for name in ("images", "texts")}
    known["scale"] = torch.tensor(scale, dtype=dtype)
    exact = {k: v.double() if v.is_floating_point() else v for k, v in known.items()}
    actual = evaluate(clip_loss, case, known, {"tile": 16, **case.options})
    expected = evaluate(oracles.clip, case, exact, case.options)
    assert_close(case, actual, expected, EXACT if dtype == torch.float64 else 1e-6 * scale)


def test_scale_of_one_element_and_scale_zero():
    for loss in ("clip", "siglip"):
        case = Case(loss)
        known = case.inputs()
        known["scale"] = torch.zeros(1, dtype=torch.float64)
        known["bias"] = torch.full((1,), -2.0, dtype=torch.float64)
        actual = evaluate(OURS[loss], case, known, {"tile": 5})
        expected = evaluate(ORACLES[loss], case, known, {})
        assert actual[0].shape == () and actual[1][2].shape == (1,)
        assert_close(case, actual, (expected[0].reshape(()), expected[1]))


@pytest.mark.parametrize("loss", OURS)
def test_autocast_changes_nothing(loss):
    case = Case(loss)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = evaluate(OURS[loss], case, case.inputs(), {"tile": 5})
    assert_close(case, actual, expected_of(case))


def test_a_wire_dtype_rounds_the_texts_and_nothing_else():
    case = Case("clip")
    known = case.inputs()
    actual = evaluate(clip_loss, case, known, {"wire": torch.bfloat16})
    rounded = case.inputs()
    rounded["texts"] = rounded["texts"].bfloat16().double()
    assert_close(case, actual, evaluate(oracles.clip, case, rounded, {}))
    assert abs(actual[0] - expected_of(case)[0]) > 1e-6


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(sorted(OURS)),
    st.integers(1, 30),
    st.integers(1, 9),
    st.integers(1, 40),
    st.integers(0, 10**6),
)
def test_rotations_and_permutations_change_nothing(loss, count, dim, tile, seed):
    """The hyperspherical property: only inner products matter, and no order of samples."""
    case = Case(loss, count, dim, seed, with_ids=("ids",))
    known = case.inputs()
    value, gradients = evaluate(OURS[loss], case, known, {"tile": tile})
    draw = torch.Generator().manual_seed(seed)
    rotation = torch.linalg.qr(torch.randn(dim, dim, generator=draw, dtype=torch.float64))[0]
    order = torch.randperm(count, generator=draw)
    moved = {k: v.detach()[order] if k in BY_ROW else v.detach() for k, v in known.items()}
    for name in ("images", "texts"):
        moved[name] = moved[name] @ rotation
    moved_value, moved_gradients = evaluate(OURS[loss], case, moved, {})
    assert moved_value.item() == pytest.approx(value.item(), abs=1e-9)
    assert torch.allclose(moved_gradients[0], gradients[0][order] @ rotation, rtol=0, atol=1e-9)


# ------------------------------------------------------------------------------ several ranks

PARTS = {
    1: [(23,)],
    2: [(12, 11), (0, 23), (1, 22)],
    3: [(8, 8, 7), (1, 0, 22)],
    4: [(6, 6, 6, 5), (0, 20, 1, 2)],
}


def _cut(counts, rank):
    return slice(sum(counts[:rank]), sum(counts[: rank + 1]))


def _losses_of_a_rank(group, cases, parts):
    rank = torch.distributed.get_rank(group)
    engine._KEPT_ELEMENTS, engine._KEPT_OF_ROWS = 0, 0.3  # some tiles kept, some multiplied again
    return [
        evaluate(
            OURS[case.loss],
            case,
            case.inputs(_cut(counts, rank)),
            {**case.options, **case.ours},
            (group,),
        )
        for counts in parts
        for case in cases
    ]


def over_ranks(case, results):
    """The global value and gradients: means over ranks, rows put together."""
    world_size = len(results)
    gradients = [
        torch.cat(g) / world_size if name in BY_ROW else torch.stack(g).mean(0)
        for name, *g in zip(INPUTS[case.loss], *(r[1] for r in results), strict=True)
    ]
    return torch.stack([r[0] for r in results]).mean(), gradients


@pytest.mark.parametrize("visiting", ["gather", "ring"])
@pytest.mark.parametrize("world_size", PARTS)
def test_equals_the_oracle_on_any_number_of_ranks(world_size, visiting):
    cases = [replace(c, ours={"visiting": visiting, "tile": t}) for c in CASES for t in (5, None)]
    results = run_ranks(world_size, _losses_of_a_rank, cases, PARTS[world_size])
    by_case = zip(*results, strict=True)
    for _ in PARTS[world_size]:
        for case in cases:
            assert_close(case, over_ranks(case, next(by_case)), expected_of(case))


def test_equal_rows_give_each_rank_its_own_mean():
    """What a person reads in a rank's log, and what DESIGN section 2 promises."""
    case = Case("clip", count=8)
    results = run_ranks(2, _losses_of_a_rank, [case], [(4, 4)])
    known = case.inputs()
    logits = known["scale"] * known["images"] @ known["texts"].T
    target = torch.arange(8)
    each = F.cross_entropy(logits, target, reduction="none") / 2
    each += F.cross_entropy(logits.T, target, reduction="none") / 2
    for rank, [(value, _)] in enumerate(results):
        assert value.item() == pytest.approx(each[4 * rank :][:4].mean().item(), abs=1e-12)


def _low_precision_of_a_rank(group, case, counts, dtype):
    known = case.inputs(_cut(counts, torch.distributed.get_rank(group)))
    known |= {name: known[name].to(dtype) for name in ("images", "texts")}
    return evaluate(OURS[case.loss], case, known, case.ours, (group,))


@pytest.mark.parametrize("visiting", ["gather", "ring"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_on_two_ranks(dtype, visiting):
    case = Case("siglip", count=16, dim=32, ours={"visiting": visiting})
    results = run_ranks(2, _low_precision_of_a_rank, case, (7, 9), dtype)
    value, gradients = over_ranks(case, [(v.double(), g) for v, g in results])
    known = case.inputs()
    known |= {name: known[name].to(dtype).double() for name in ("images", "texts")}
    expected, exact_gradients = evaluate(oracles.siglip, case, known, {})
    assert value.item() == pytest.approx(expected.item(), rel=1e-6)
    for gradient, exact in zip(gradients, exact_gradients, strict=True):
        assert torch.allclose(gradient.double(), exact, rtol=0, atol=2 * torch.finfo(dtype).eps)


def test_the_wire_dtype_gives_the_same_loss_on_any_number_of_ranks():
    case = Case("clip", ours={"wire": torch.bfloat16})
    one = evaluate(clip_loss, case, case.inputs(), case.ours)
    for world_size in (2, 3):
        results = run_ranks(world_size, _losses_of_a_rank, [case], PARTS[world_size][:1])
        value, gradients = over_ranks(case, [r[0] for r in results])
        assert value.item() == pytest.approx(one[0].item(), abs=EXACT)
        assert torch.allclose(gradients[0], one[1][0], rtol=0, atol=EXACT)
        assert torch.allclose(gradients[1], one[1][1], rtol=0, atol=2**-8)  # rounded on the way


# --------------------------------------------------------------------- other people's losses


@cache
def open_clip_losses():
    """open_clip's loss module alone: the package would import every tower first."""
    folder = importlib.util.find_spec("open_clip").submodule_search_locations[0]
    spec = importlib.util.spec_from_file_location("open_clip_loss", f"{folder}/loss.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["open_clip_loss"] = module
    spec.loader.exec_module(module)
    return module


def _beside_open_clip(group, case, count):
    rank, world_size = torch.distributed.get_rank(group), torch.distributed.get_world_size(group)
    theirs = {
        "clip": lambda: open_clip_losses().ClipLoss(
            local_loss=True, gather_with_grad=True, rank=rank, world_size=world_size
        ),
        "siglip": lambda: open_clip_losses().SigLipLoss(rank=rank, world_size=world_size),
    }[case.loss]()
    rows = _cut((count,) * world_size, rank)
    return (
        evaluate(OURS[case.loss], case, case.inputs(rows), {"tile": 5}, (group,)),
        evaluate(theirs, case, case.inputs(rows), {}),
    )


@pytest.mark.parametrize("loss", ["clip", "siglip"])
@pytest.mark.parametrize("world_size", [2, 3])
def test_equals_open_clip_over_ranks(loss, world_size):
    count = 6
    case = Case(loss, count=count * world_size)
    results = run_ranks(world_size, _beside_open_clip, case, count)
    ours = over_ranks(case, [r[0] for r in results])
    theirs = over_ranks(case, [r[1] for r in results])
    assert_close(case, ours, theirs)
    for [[_, own], [_, peers]] in results:  # what is averaged over ranks is equal on each of them
        assert torch.allclose(own[0], peers[0], rtol=0, atol=EXACT)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.3])
def test_equals_torch_cross_entropy(label_smoothing):
    case = Case("clip", options={"label_smoothing": label_smoothing})
    known = case.inputs()
    logits, target = known["scale"] * known["images"] @ known["texts"].T, torch.arange(case.count)
    expected = sum(
        F.cross_entropy(z, target, label_smoothing=label_smoothing) / 2 for z in (logits, logits.T)
    )
    assert expected_of(case)[0].item() == pytest.approx(expected.item(), abs=1e-12)


def test_equals_pytorch_metric_learning():
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    miners = pytest.importorskip("pytorch_metric_learning.miners")
    reducers = pytest.importorskip("pytorch_metric_learning.reducers")
    known = Case("supcon", count=40, seed=3).inputs()
    rows, labels = known["images"].requires_grad_(), known["labels"]
    unit = F.normalize(rows, dim=1)  # theirs do so inside, which projects the gradient
    supcon = losses.SupConLoss(temperature=0.2, reducer=reducers.MeanReducer())
    mined = losses.MultiSimilarityLoss()
    five = torch.tensor(5.0, dtype=torch.float64)
    pairs = [
        (supcon_loss(unit, labels, five, tile=7), supcon(rows, labels)),
        (
            multi_similarity_loss(unit, labels, tile=7),
            mined(rows, labels, miners.MultiSimilarityMiner()(rows, labels)),
        ),
        (multi_similarity_loss(unit, labels, epsilon=torch.inf), mined(rows, labels)),
    ]
    for ours, theirs in pairs:
        assert ours.item() == pytest.approx(theirs.item(), abs=1e-9)
        (actual,), (expected,) = (
            torch.autograd.grad(x, rows, retain_graph=True) for x in (ours, theirs)
        )
        assert torch.allclose(actual, expected, rtol=0, atol=1e-9)


# ----------------------------------------------------------------------------- what is refused

ROWS_A, ROWS_B = torch.zeros(3, 2), torch.zeros(4, 2)
ONE = torch.tensor(1.0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: clip_loss(ROWS_A, ROWS_B, ONE), r"images \(3, 2\), texts \(4, 2\)"),
        (lambda: clip_loss(ROWS_A.long(), ROWS_A, ONE), "images is torch.int64"),
        (lambda: clip_loss(ROWS_A, ROWS_A[0], ONE), r"shape \(2,\)"),
        (lambda: clip_loss(ROWS_A, ROWS_A, torch.ones(2)), r"scale has shape \(2,\)"),
        (lambda: clip_loss(ROWS_A, ROWS_A, ONE, label_smoothing=1.0), "label_smoothing=1.0"),
        (lambda: clip_loss(ROWS_A, ROWS_A, ONE, ids=torch.zeros(4).long()), r"ids .*\(3,\)"),
        (lambda: clip_loss(ROWS_A, ROWS_A, ONE, caption_ids=torch.zeros(3)), "caption_ids is"),
        (lambda: clip_loss(ROWS_A, ROWS_A, ONE, visiting="bus"), "'gather' or 'ring'"),
        (lambda: clip_loss(ROWS_A, ROWS_A, ONE, tile=0), "tile=0"),
        (lambda: siglip_loss(ROWS_A, ROWS_A, ONE, torch.ones(2)), r"bias has shape \(2,\)"),
        (lambda: supcon_loss(ROWS_A, torch.zeros(4).long(), ONE), "labels is"),
        (lambda: supcon_loss(ROWS_A, torch.zeros(3).long(), torch.ones(3)), "scale has"),
        (lambda: multi_similarity_loss(ROWS_A, torch.zeros(3)), "labels is torch.float32"),
    ],
)
def test_wrong_input_is_one_clear_line(call, message):
    with pytest.raises(ValueError, match=message) as raised:
        call()
    assert "\n" not in str(raised.value)
