"""Losses of queries against labels: the naive oracle, ranks, masks, shard edges, memory."""

from dataclasses import dataclass, field, replace
from decimal import Decimal, localcontext

import label_oracles
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import run_ranks
from torch.utils._python_dispatch import TorchDispatchMode

from trainer.losses import (
    Positives,
    decoupled_loss,
    info_nce_loss,
    one_vs_all_loss,
    soft_topk,
    soft_topk_loss,
    topk_hinge_loss,
)
from trainer.similarity import pairs as engine
from trainer.similarity.pair_list import PairList
from trainer.similarity.topk import measure_topk

EXACT = 1e-10
KNOWN = {}  # what the oracle said of a case
OURS = {
    "info_nce": info_nce_loss,
    "decoupled": decoupled_loss,
    "soft_topk": soft_topk_loss,
    "topk_hinge": topk_hinge_loss,
    "one_vs_all": one_vs_all_loss,
}
ORACLES = {
    "info_nce": label_oracles.decoupled,
    **{name: getattr(label_oracles, name) for name in list(OURS)[1:]},
}


@dataclass(eq=False)
class Case:
    """A global batch: queries, label rows of some ids, and what is positive."""

    loss: str
    count: int = 13
    rows: int = 17
    ids: int = 0  # label ids that rows are drawn from, with repetition; 0: each row its own
    dim: int = 5
    most: int = 4  # positives of a query
    seed: int = 0
    scale: float = 9.0
    options: dict = field(default_factory=dict)
    drawn: bool = False
    bias: bool = True
    weighted: bool = False

    def weights(self):
        draw = torch.Generator().manual_seed(self.seed + 1)
        weights = torch.rand(self.count, generator=draw, dtype=torch.float64) * 3
        return weights.masked_fill(torch.arange(self.count) % 6 == 2, 0.0)

    def inputs(self):
        draw = torch.Generator().manual_seed(self.seed)
        rows = torch.randn(self.count + self.rows, self.dim, generator=draw, dtype=torch.float64)
        queries, labels = F.normalize(rows, dim=1).split([self.count, self.rows])
        if self.ids:
            label_ids = torch.randint(0, self.ids, (self.rows,), generator=draw) * 3
        else:
            label_ids = torch.arange(self.rows) * 3  # ids between have no row
        top = max(int(label_ids.max()) + 2, 1) if self.rows else 2
        positives = []
        for i in range(self.count):
            size = min(0 if i % 5 == 3 else i % (self.most + 1), top)
            positives.append(torch.randperm(top, generator=draw)[:size].tolist())
            if i % 3 and self.rows:  # most of the others have no row
                positives[-1] = list({*positives[-1], int(label_ids[i % self.rows])})
        numbers = {
            "queries": queries,
            "labels": labels,
            "scale": torch.tensor(self.scale, dtype=torch.float64),
        }
        if self.loss == "one_vs_all":
            numbers["bias"] = torch.tensor([-1.5], dtype=torch.float64) if self.bias else None
        drawn = [x[len(x) // 2] if x else -1 for x in positives] if self.drawn else None
        return numbers, positives, label_ids, drawn


def csr(positives):
    lengths = torch.tensor([0, *map(len, positives)])
    return Positives(lengths.cumsum(0), torch.tensor([x for p in positives for x in p]).long())


def differentiate(value, numbers):
    inputs = [x for x in numbers.values() if x is not None]
    return value.detach(), list(torch.autograd.grad(value, inputs))


def expected_of(case):
    if repr(case) not in KNOWN:
        KNOWN[repr(case)] = _expected_of(case)
    return KNOWN[repr(case)]


def _expected_of(case):
    numbers, positives, label_ids, drawn = case.inputs()
    for x in numbers.values():
        if x is not None:
            x.requires_grad_()
    options = {**case.options, **({"drawn": drawn} if case.drawn else {})}
    if case.weighted:
        return differentiate(weighted_mean(case, numbers, positives, label_ids, drawn), numbers)
    value = ORACLES[case.loss](*numbers.values(), positives, label_ids.tolist(), **options)
    return differentiate(value, numbers)


def weighted_mean(case, numbers, positives, label_ids, drawn):
    """Each query alone by the oracle, times its weight."""
    queries, *others = numbers.values()
    total = queries.sum() * 0
    for i, weight in enumerate(case.weights().tolist()):
        options = {**case.options, **({"drawn": drawn[i : i + 1]} if case.drawn else {})}
        total = total + weight * ORACLES[case.loss](
            queries[i : i + 1], *others, positives[i : i + 1], label_ids.tolist(), **options
        )
    return total / case.count


def actual_of(case, group=None, cuts=(slice(None), slice(None)), dtype=torch.float64, **ours):
    """Ours on this rank's cut of the queries and of the label rows."""
    numbers, positives, label_ids, drawn = case.inputs()
    numbers["queries"], numbers["labels"] = numbers["queries"][cuts[0]], numbers["labels"][cuts[1]]
    numbers = {k: x if x is None else x.to(dtype).requires_grad_() for k, x in numbers.items()}
    if case.weighted:
        ours["row_weights"] = case.weights()[cuts[0]]
    if case.drawn:
        ours["drawn"] = torch.tensor(drawn, dtype=torch.int64)[cuts[0]]
    value = OURS[case.loss](
        *numbers.values(),
        csr(positives[cuts[0]]),
        label_ids[cuts[1]],
        group,
        **case.options,
        **ours,
    )
    return differentiate(value, numbers)


def assert_close(case, actual, expected, tolerance=EXACT):
    pairs = zip([actual[0], *actual[1]], [expected[0], *expected[1]], strict=True)
    for name, (x, y) in zip(("value", "queries", "labels", "scale", "bias"), pairs, strict=False):
        assert x.shape == y.shape and x.isfinite().all(), (case, name)
        error = (x.double() - y).abs().max().item() if y.numel() else 0.0
        size = max(1.0, y.abs().max().item() if y.numel() else 0.0)
        assert error <= tolerance * size, f"{case}: {name} is off by {error}"


OPTIONS = {
    "info_nce": [{}],
    "decoupled": [{}],
    "soft_topk": [{}, {"k": 3}, {"k": 2, "alpha": 0.3}, {"alpha": 7.0}],
    "topk_hinge": [{}, {"k": 3}, {"k": 100}, {"k": 4, "softmax_temperature": 0.7, "margin": 2.0}],
    "one_vs_all": [{}],
}
CASES = [
    Case(loss, options=options, drawn=drawn, ids=ids)
    for loss in OURS
    for options in OPTIONS[loss]
    for drawn in ([False] if loss == "one_vs_all" else [False, True])
    for ids in (0, 12)
] + [
    Case("one_vs_all", bias=False),
    Case("one_vs_all", weighted=True, ids=12),
    Case("info_nce", weighted=True, drawn=True),
    Case("decoupled", weighted=True, ids=12),
    Case("soft_topk", weighted=True, options={"k": 3}),
    Case("soft_topk", weighted=True, drawn=True, ids=12),
    Case("topk_hinge", weighted=True, options={"k": 4, "softmax_temperature": 0.7, "margin": 2.0}),
    Case("topk_hinge", weighted=True, drawn=True),
    Case("decoupled", scale=3000.0),
    Case("soft_topk", scale=30.0),
    Case("topk_hinge", scale=1.0),
]


# ------------------------------------------------------------------------------- one process


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("tile", [1, 4, None])
def test_equals_the_oracle_at_any_tile(case, tile):
    assert_close(case, actual_of(case, tile=tile), expected_of(case))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_oracle_when_few_tiles_are_kept(case, monkeypatch):
    monkeypatch.setattr("trainer.similarity.pairs._KEPT_ELEMENTS", 0)
    monkeypatch.setattr("trainer.similarity.pairs._KEPT_OF_ROWS", 0.3)
    assert_close(case, actual_of(case, tile=4), expected_of(case))


@pytest.mark.parametrize("loss", OURS)
@pytest.mark.parametrize(("count", "rows"), [(0, 0), (0, 6), (4, 0), (1, 1), (1, 9), (9, 1)])
def test_equals_the_oracle_at_any_shape(loss, count, rows):
    case = Case(loss, count, rows, dim=3)
    assert_close(case, actual_of(case, tile=3), expected_of(case))


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(sorted(OURS)),
    st.integers(0, 20),
    st.integers(1, 30),
    st.integers(0, 20),
    st.integers(1, 12),
    st.booleans(),
    st.integers(1, 31),
    st.integers(0, 10**6),
)
def test_equals_the_oracle_whatever_is_positive(loss, count, rows, ids, most, drawn, tile, seed):
    drawn = drawn and loss != "one_vs_all"
    case = Case(loss, count, rows, ids=ids, most=most, drawn=drawn, seed=seed, dim=3)
    assert_close(case, actual_of(case, tile=tile), expected_of(case), 1e-9)


@pytest.mark.parametrize("loss", OURS)
def test_the_order_of_lists_and_names_twice_change_nothing(loss):
    case = Case(loss)
    numbers, positives, label_ids, _ = case.inputs()
    doubled = csr([[*reversed(p), *p] for p in positives])
    value = OURS[loss](*numbers.values(), doubled, label_ids, tile=4)
    assert value.item() == pytest.approx(expected_of(case)[0].item(), abs=EXACT)


@pytest.mark.parametrize("loss", OURS)
@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (0, 2), (1, 2), ()])
def test_only_what_needs_a_gradient_gets_one(loss, needed):
    case = Case(loss, ids=12)
    numbers, positives, label_ids, _ = case.inputs()
    inputs = list(numbers.values())
    for index in needed:
        inputs[index].requires_grad_()
    value = OURS[loss](*inputs, csr(positives), label_ids, tile=5)
    expected = expected_of(case)
    assert value.item() == pytest.approx(expected[0].item(), abs=EXACT)
    assert value.requires_grad == bool(needed)
    if needed:
        value.backward()
    for index, tensor in enumerate(inputs[:3]):
        if index in needed:
            assert torch.allclose(tensor.grad, expected[1][index], rtol=0, atol=1e-9)
        else:
            assert tensor.grad is None


@pytest.mark.parametrize("loss", OURS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_is_finite_and_close(loss, dtype):
    case = Case(loss, count=40, rows=60, dim=32, scale=20.0)
    numbers, positives, label_ids, _ = case.inputs()
    coarse = {k: x.to(torch.bfloat16) for k, x in numbers.items()}
    exact = {k: x.double().requires_grad_() for k, x in coarse.items()}
    expected = differentiate(ORACLES[loss](*exact.values(), positives, label_ids.tolist()), exact)
    known = {k: x.to(dtype).requires_grad_() for k, x in coarse.items()}
    value = OURS[loss](*known.values(), csr(positives), label_ids, tile=16)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(expected[0].item(), rel=2e-5)
    actual = differentiate(value, known)
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    for x, y in zip(actual[1], expected[1], strict=True):
        assert (x.double() - y).abs().max() <= tolerance * max(1.0, y.abs().max())


# ----------------------------------------------------------------------- what is left out


def test_one_positive_each_is_cross_entropy():
    draw = torch.Generator().manual_seed(1)
    queries, labels = (F.normalize(torch.randn(n, 4, generator=draw), dim=1) for n in (6, 9))
    own = torch.randint(0, 9, (6,), generator=draw)
    lists, scale = csr([[int(x)] for x in own]), torch.tensor(7.0)
    expected = F.cross_entropy(scale * queries @ labels.T, own)
    for loss in (decoupled_loss, info_nce_loss):
        for drawn in (None, own):
            value = loss(queries, labels, scale, lists, torch.arange(9), drawn=drawn)
            assert value.item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("loss", ["info_nce", "decoupled", "soft_topk", "topk_hinge"])
def test_undrawn_positives_are_neither_pulled_nor_pushed(loss):
    case = Case(loss, count=1, rows=30, dim=8, scale=3.0, drawn=True)
    numbers, _, label_ids, _ = case.inputs()
    for x in numbers.values():
        x.requires_grad_()
    positives = csr([[0, 6, 12, 15]])
    value = OURS[loss](*numbers.values(), positives, label_ids, drawn=torch.tensor([6]), tile=4)
    (gradient,) = torch.autograd.grad(value, numbers["labels"])
    along = (gradient * numbers["queries"]).sum(1)
    assert (gradient[[0, 4, 5]] == 0).all() and along[2] < 0
    assert (along[[i for i in range(30) if i not in (0, 2, 4, 5)]] >= 0).all()


@pytest.mark.parametrize("loss", OURS)
def test_a_label_twice_counts_once_and_a_query_without_positives_not_at_all(loss):
    case = Case(loss, ids=8, rows=30)
    _, positives, label_ids, _ = case.inputs()
    _, (for_queries, for_labels, *_) = actual_of(case)
    known = set(label_ids.tolist())
    alone = torch.tensor([not known & set(p) for p in positives])
    assert alone.any() and (for_queries[alone] == 0).all() and (for_queries[~alone] != 0).any()
    first = torch.zeros(30, dtype=torch.bool)
    first[label_oracles._columns(label_ids.tolist())] = True
    assert (~first).any() and (for_labels[~first] == 0).all()
    assert loss == "topk_hinge" or (for_labels[first] != 0).any(1).all()


def test_without_enough_negatives_the_hinge_takes_no_positive():
    """NGAME's released code gathers from unmasked scores: known positives re-enter."""
    queries, labels = torch.ones(1, 1), torch.tensor([[1.0], [0.9], [-1.0]]).requires_grad_()
    lists = csr([[0, 1]])
    value = topk_hinge_loss(
        queries, labels, torch.tensor(1.0), lists, torch.arange(3), k=3, margin=2.5
    )
    assert value.item() == pytest.approx((0.5 + 0.6) / 2 / 3)
    (gradient,) = torch.autograd.grad(value, labels)
    assert torch.allclose(gradient, torch.tensor([[-1 / 6], [-1 / 6], [1 / 3]]))


@pytest.mark.parametrize("loss", OURS)
def test_when_all_labels_are_positives(loss):
    case = Case(loss, count=3, rows=4)
    numbers, _, label_ids, _ = case.inputs()
    for x in numbers.values():
        x.requires_grad_()
    value = OURS[loss](*numbers.values(), csr([label_ids.tolist()] * 3), label_ids, tile=2)
    gradients = torch.autograd.grad(value, list(numbers.values()))
    if loss != "one_vs_all":
        assert value == 0 and all((g == 0).all() for g in gradients)


def test_a_very_large_temperature_weighs_hinges_alike():
    case = Case("topk_hinge", options={"k": 6})
    hot = replace(case, options={"k": 6, "softmax_temperature": 1e12})
    assert_close(case, actual_of(hot), expected_of(case), 1e-9)


# ----------------------------------------------------------------------- the soft top-k's root


def test_soft_topk_against_finite_differences():
    case = Case("soft_topk", count=3, rows=8, dim=3, scale=4.0, options={"k": 2})
    numbers, _, label_ids, _ = case.inputs()
    lists = csr([[0], [3, 9], [21]])

    def loss(*inputs):
        return soft_topk_loss(*inputs, lists, label_ids, k=2)

    inputs = [x.requires_grad_() for x in numbers.values()]
    gradients = torch.autograd.grad(loss(*inputs), inputs)
    for index, gradient in enumerate(gradients):
        for place in range(gradient.numel()):
            sides = []
            for step in (1e-5, -1e-5):
                moved = [x.detach().clone() for x in inputs]
                moved[index].view(-1)[place] += step
                sides.append(loss(*moved))
            slope = (sides[0] - sides[1]) / 2e-5
            assert slope.item() == pytest.approx(gradient.view(-1)[place].item(), abs=1e-8)


def test_where_labels_are_clearly_in_or_out_the_root_is_still_right():
    """The sum of sigmoids is k to the last bit over a wide range of t; the root is inside it."""
    cosines = torch.tensor([0.9, 0.8, 0.45, 0.1, -0.3], dtype=torch.float64)
    scale, alpha, k = 300.0, 2.0, 2
    with localcontext() as context:
        context.prec = 80
        z = [Decimal(x) * Decimal(scale * alpha) for x in cosines.tolist()]
        low, high = Decimal(-2000), Decimal(2000)
        for _ in range(150):
            t = (low + high) / 2
            passing = sum(1 / (1 + (-(x + t)).exp()) for x in z)
            low, high = (t, high) if passing < k else (low, t)
        expected = float((1 + (-(z[2] + t)).exp()).ln())
    value = soft_topk_loss(
        torch.ones(1, 1, dtype=torch.float64),
        cosines.unsqueeze(1),
        torch.tensor(scale, dtype=torch.float64),
        csr([[2]]),
        torch.arange(5),
        k=k,
        alpha=alpha,
    )
    assert value.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("scale", [1.0, 20.0, 100.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_few_steps_find_the_root(scale, dtype, monkeypatch):
    sweeps = []
    whole = soft_topk._pass
    monkeypatch.setattr(soft_topk, "_pass", lambda *a: sweeps.append(1) or whole(*a))
    case = Case("soft_topk", count=60, rows=500, dim=16, scale=scale)
    actual_of(case, dtype=dtype)
    assert len(sweeps) <= {1.0: 3, 20.0: 13, 100.0: 20}[scale]


# ------------------------------------------------------------------------------ several ranks

PARTS = {  # queries and label rows of each rank
    1: [((13,), (17,))],
    2: [((7, 6), (9, 8)), ((0, 13), (17, 0)), ((13, 0), (0, 17))],
    3: [((5, 5, 3), (6, 6, 5)), ((13, 0, 0), (1, 0, 16))],
    4: [((4, 4, 4, 1), (5, 5, 5, 2)), ((0, 1, 12, 0), (0, 8, 0, 9))],
}


def _cut(counts, rank):
    return slice(sum(counts[:rank]), sum(counts[: rank + 1]))


def are_parts(number, place):
    return (number + place) % 4 in (1, 2)  # with and without duplicates, drawn or not


def _losses_of_a_rank(group, cases, parts):
    rank = torch.distributed.get_rank(group)
    engine._KEPT_ELEMENTS, engine._KEPT_OF_ROWS = 0, 0.3  # some tiles kept, some multiplied again
    return [
        actual_of(
            case,
            group,
            (_cut(queries, rank), _cut(rows, rank)),
            labels_are_parts=are_parts(number, place),
            tile=4 if are_parts(number, place) else 7,
        )
        for number, (queries, rows) in enumerate(parts)
        for place, case in enumerate(cases)
    ]


def over_ranks(results, labels_are_parts):
    """The global value and gradients: means over ranks, rows put together."""
    world_size = len(results)
    queries, labels, *numbers = zip(*(r[1] for r in results), strict=True)
    gradients = [
        torch.cat(queries) / world_size,
        torch.cat(labels) / (1 if labels_are_parts else world_size),
        *(torch.stack(g).mean(0) for g in numbers),
    ]
    return torch.stack([r[0] for r in results]).mean(), gradients


@pytest.mark.parametrize("world_size", PARTS)
def test_equals_the_oracle_on_any_number_of_ranks(world_size):
    results = run_ranks(world_size, _losses_of_a_rank, CASES, PARTS[world_size])
    answers = zip(*results, strict=True)
    for number in range(len(PARTS[world_size])):
        for place, case in enumerate(CASES):
            actual = over_ranks(next(answers), are_parts(number, place))
            assert_close(case, actual, expected_of(case))


def _values_of_a_rank(group, case, counts):
    cuts = [_cut(c, torch.distributed.get_rank(group)) for c in counts]
    return actual_of(case, group, cuts)[0].item()


def test_equal_rows_give_each_rank_the_mean_of_its_own_queries():
    case = Case("decoupled", count=8)
    numbers, positives, label_ids, _ = case.inputs()
    each = [
        label_oracles.decoupled(
            numbers["queries"][i : i + 1],
            numbers["labels"],
            numbers["scale"],
            positives[i : i + 1],
            label_ids.tolist(),
        ).item()
        for i in range(8)
    ]
    values = run_ranks(2, _values_of_a_rank, case, ((4, 4), (5, 12)))
    assert values == pytest.approx([sum(each[:4]) / 4, sum(each[4:]) / 4], abs=1e-12)


def _edges_of_a_rank(group, loss, num_labels):
    """Each label is the one positive of one query; parts are cut as class centers are."""
    rank, world_size = torch.distributed.get_rank(group), torch.distributed.get_world_size(group)
    edges = [num_labels * r // world_size for r in range(world_size + 1)]
    own = torch.arange(edges[rank], edges[rank + 1])
    order = torch.randperm(num_labels, generator=torch.Generator().manual_seed(3))[rank::world_size]
    queries, rows = torch.eye(num_labels), torch.full((len(own), num_labels), 0.1).requires_grad_()
    scalars = [torch.tensor(5.0)] + [None] * (loss == "one_vs_all")
    lists = csr([[int(x)] for x in order])
    value = OURS[loss](queries[order], rows, *scalars, lists, own, group, labels_are_parts=True)
    (gradient,) = torch.autograd.grad(value, rows)
    return (gradient * queries[own]).sum(1)  # each label's weight with its query alone


def _all_edges_of_a_rank(group, num_labels):
    return {loss: _edges_of_a_rank(group, loss, num_labels) for loss in OURS}


def test_the_last_label_of_every_part_is_pulled_by_its_positive():
    """DEXML's released code drops it and trains it as a negative; 11 labels on 3 ranks."""
    results = run_ranks(3, _all_edges_of_a_rank, 11)
    for loss in OURS:
        weights = torch.cat([r[loss] for r in results])
        assert len(weights) == 11 and (weights < 0).all(), loss


def _refusals_of_a_rank(group):
    rank = torch.distributed.get_rank(group)
    rows, one, lists = torch.eye(2), torch.tensor(1.0), csr([[0], [1]])
    messages = []
    for options in ({"drawn": torch.tensor([0, 3 * rank - 1])}, {"k": 2}):
        try:
            soft_topk_loss(rows, rows, one, lists, torch.arange(2), group, **options)
        except ValueError as error:
            messages.append(str(error))
    return messages


def test_every_rank_refuses_what_one_rank_cannot_use():
    for messages in run_ranks(2, _refusals_of_a_rank):
        assert "drawn label 2 is no positive of query 3" in messages[0]
        assert "k=2 of 2 labels for query 0" in messages[1]


# -------------------------------------------------------------- what the engine has for them


def _sparse_of_a_rank(group, visiting):
    rank = torch.distributed.get_rank(group)
    draw = torch.Generator().manual_seed(0)
    rows, visitors, table = (torch.randn(9, n, generator=draw).double() for n in (3, 3, 9))
    cut = _cut((4, 0, 5), rank)
    at_row, at_column = (table[cut] > 0.5).nonzero(as_tuple=True)
    weights = table[cut][at_row, at_column]

    def pairs():
        return engine.Pairs(rows[cut], visitors[cut], group, visiting=visiting, tile=2)

    listed, order = PairList(pairs(), at_row, at_column), torch.randperm(len(weights))
    found = torch.zeros_like(table[cut])
    for tile in pairs().tiles():
        span, at = listed.at(tile)
        found[tile.rows, tile.columns][at] = weights[listed.order][span]
    sparse = pairs().sparse_gradients(at_row[order], at_column[order], weights[order])
    dense = pairs().gradients(lambda tile: found[tile.rows, tile.columns])
    top = measure_topk(pairs(), pairs().tiles(), 3, cut.start)
    exact = (rows @ visitors.T).topk(3, dim=0)
    assert torch.allclose(top.values, exact.values.T, rtol=0, atol=1e-13)
    assert torch.equal(top.rows, exact.indices.T)
    assert torch.equal(found, table[cut].where(table[cut] > 0.5, torch.zeros(()).double()))
    return [torch.allclose(x, y, rtol=0, atol=1e-13) for x, y in zip(sparse, dense, strict=True)]


@pytest.mark.parametrize("visiting", ["gather", "ring"])
def test_few_pairs_and_the_largest_of_columns(visiting):
    assert run_ranks(3, _sparse_of_a_rank, visiting) == [[True, True]] * 3


# ------------------------------------------------------------------------------------ memory


class _Largest(TorchDispatchMode):
    """Bytes of the largest tensor that any operation makes."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (tuple, list)) else [made]:
            if isinstance(tensor, torch.Tensor):
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return made


@pytest.mark.parametrize("loss", OURS)
def test_nothing_larger_than_the_rows_is_ever_made(loss, monkeypatch):
    monkeypatch.setattr("trainer.similarity.pairs._KEPT_ELEMENTS", 0)
    count, rows, dim, tile = 300, 3000, 8, 100
    queries, labels = F.normalize(torch.randn(count + rows, dim), dim=1).split([count, rows])
    scalars = [torch.tensor(5.0)] + [None] * (loss == "one_vs_all")
    lists = csr(torch.randint(0, rows, (count, 3)).tolist())
    with _Largest() as largest:
        value = OURS[loss](
            queries.requires_grad_(),
            labels.requires_grad_(),
            *scalars,
            lists,
            torch.arange(rows),
            tile=tile,
        )
        value.backward()
    # The kept tiles are one block of 1.5 times the rows.
    assert largest.bytes <= 6 * (count + rows) * dim < 4 * count * rows / 20


# ----------------------------------------------------------------------------- what is refused

ROWS, ONE, LISTS, IDS = torch.zeros(3, 2), torch.tensor(1.0), csr([[0], [], [1]]), torch.arange(3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: decoupled_loss(ROWS[0], ROWS, ONE, LISTS, IDS), r"queries is .*\(2,\)"),
        (lambda: decoupled_loss(ROWS, ROWS.long(), ONE, LISTS, IDS), "labels is torch.int64"),
        (lambda: decoupled_loss(ROWS, ROWS[:, :1], ONE, LISTS, IDS), "both need one width"),
        (lambda: decoupled_loss(ROWS, ROWS, torch.ones(2), LISTS, IDS), r"scale has shape \(2,\)"),
        (lambda: decoupled_loss(ROWS, ROWS, ONE, LISTS, IDS[:2]), r"label_ids is .*\(3,\)"),
        (lambda: decoupled_loss(ROWS, ROWS, ONE, LISTS, IDS.float()), "label_ids is torch.float32"),
        (lambda: info_nce_loss(ROWS, ROWS, ONE, LISTS, IDS, drawn=IDS[:1]), "drawn is"),
        (
            lambda: info_nce_loss(ROWS, ROWS, ONE, LISTS, IDS, drawn=IDS),
            "drawn label 1 is no positive of query 1",
        ),
        (lambda: decoupled_loss(ROWS, ROWS, ONE, csr([[0]]), IDS), "offsets of 3 queries is"),
        (
            lambda: decoupled_loss(ROWS, ROWS, ONE, Positives(torch.arange(4), IDS[:2]), IDS),
            r"\[0, 1, 2, 3\]: give 4 numbers",
        ),
        (
            lambda: decoupled_loss(
                ROWS, ROWS, ONE, Positives(torch.tensor([0, 2, 1, 3]), IDS), IDS
            ),
            r"\[0, 2, 1, 3\]",
        ),
        (lambda: soft_topk_loss(ROWS, ROWS, ONE, LISTS, IDS, k=3), "k=3 of 3 labels for query 0"),
        (lambda: soft_topk_loss(ROWS, ROWS, ONE, LISTS, IDS, k=-1), "k=-1"),
        (lambda: soft_topk_loss(ROWS, ROWS, ONE, LISTS, IDS, alpha=0.0), "alpha=0.0"),
        (lambda: topk_hinge_loss(ROWS, ROWS, ONE, LISTS, IDS, k=0), "k=0"),
        (
            lambda: topk_hinge_loss(ROWS, ROWS, ONE, LISTS, IDS, softmax_temperature=0.0),
            "softmax_temperature=0.0",
        ),
        (lambda: one_vs_all_loss(ROWS, ROWS, ONE, torch.ones(2), LISTS, IDS), "bias has shape"),
        (lambda: decoupled_loss(ROWS, ROWS, ONE, LISTS, IDS, tile=0), "tile=0"),
    ],
)
def test_wrong_input_is_one_clear_line(call, message):
    with pytest.raises(ValueError, match=message) as raised:
        call()
    assert "\n" not in str(raised.value)
