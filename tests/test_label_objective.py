"""The objective of texts against labels: its draws, its gradients and the steps of classifiers."""

import copy
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from ranks import run_ranks
from tiny_texts import text_config

from data.config import NegativesConfig
from data.label_lists import LabelLists
from data.loader import Batch
from data.negatives.plan import BatchPlan, make_plan
from data.order import Order
from data.planned_order import PlannedOrder, Segment
from trainer.centers.files import load_state, state_files
from trainer.centers.label_rows import LabelRows, read_label_rows
from trainer.centers.parts import Part
from trainer.config import CentersConfig, ConfigError
from trainer.dropout import make_dropout_keyed, row_keys, use_row_keys
from trainer.hardness import Hardness
from trainer.models import build_text_model
from trainer.models.texts.label_texts import LabelTokens
from trainer.objectives.labels import LabelData, LabelObjective
from trainer.ranks import Ranks

NUM_LABELS, NUM_TEXTS, BATCH, LENGTH, DIM = 13, 40, 10, 6, 8
SGD = {"optimizer": "sgd", "momentum": 0.0, "weight_decay": 0.0, "norm_bounds": [0.0, 1e9]}


def label_lists(seed=0) -> LabelLists:
    """Rows of 0 to 4 labels."""
    rng = np.random.default_rng(seed)
    return LabelLists.of_rows(
        [rng.choice(NUM_LABELS, int(rng.integers(5)), replace=False) for _ in range(NUM_TEXTS)]
    )


def a_batch(rank: int, world_size: int, step: int = 2) -> Batch:
    """This rank's rows of a global batch of BATCH."""
    mine = torch.arange(rank, BATCH, world_size)
    ids = (mine * 7 + step) % NUM_TEXTS
    tokens = torch.stack([(ids * (i + 3)) % 29 + 1 for i in range(LENGTH)], dim=1)
    none = torch.zeros(len(mine), 3, 0, 0, dtype=torch.uint8)
    return Batch(none, tokens, ids, ids, ids * 0 - 1, mine + step * BATCH, [])


def label_tokens() -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randint(1, 30, (NUM_LABELS, LENGTH), generator=generator, dtype=torch.int32)


def a_plan(folder) -> PlannedOrder:
    """Positions of the steps that are asked for, each with up to two explicit negatives, and a
    weight.
    """
    order, rng = np.arange(NUM_TEXTS), np.random.default_rng(3)
    header = make_plan(None, order, NegativesConfig(), seed=1, version=0, batch_size=BATCH).header
    negatives = rng.integers(-1, NUM_TEXTS, (NUM_TEXTS, 2), dtype=np.int32)
    name = f"plan-{os.getpid()}"  # each rank has its own
    weights = (np.arange(NUM_TEXTS) % 4 / 2).astype(np.float32)
    plan = BatchPlan(order, np.arange(NUM_TEXTS + 1), header, negatives, weights)
    plan = plan.save(folder / name)
    planned = PlannedOrder(Order([NUM_TEXTS], seed=1, chunk=1, lanes=1, window=1), "")
    planned.start(folder, [Segment(0, NUM_TEXTS, name, plan.header.sha256)])
    return planned


def an_objective(group, folder, sections):
    """An objective over a float64 model, without an engine: nothing is stepped but classifiers."""
    config = text_config(folder, **sections)
    rank, world_size = (group.rank(), group.size()) if group else (0, 1)
    ranks = Ranks(group, rank, world_size, rank)
    rows, over = config.labels.rows, config.labels.over
    model = build_text_model(
        config.model, loss_name=config.loss.name, embeds_labels=rows == "texts", seed=1
    ).double()
    make_dropout_keyed(model)
    part = Part.of_rank(NUM_LABELS, rank, world_size)
    first, stop = (part.start, part.stop) if over == "all" else (0, NUM_LABELS)
    side = LabelTokens(first, label_tokens()[first:stop])
    if rows == "classifiers":
        side = LabelRows(NUM_LABELS, DIM, group, config=config.centers, seed=4, dtype=torch.float64)
    hardness = Hardness(0, group, due=lambda _: False)
    engine = SimpleNamespace(clamp=lambda *_: None)
    planned = a_plan(folder) if config.data.batching == "planned" else None
    return model, LabelObjective(
        config, model, engine, ranks, LabelData(label_lists(), part, "", planned), side, hardness
    )


def sections_of(loss, rows, over, explicit=0, weights="", **model):
    return {
        "data": {"batching": "planned" if explicit or weights else "plain"},
        "negatives": {"explicit": explicit, "weights": weights},
        "model": {"embedding_dim": DIM, "context_length": LENGTH, "buckets": 30, **model},
        "loss": {"name": loss},
        "labels": {"rows": rows, "over": over},
        "centers": SGD,
        "train": {"global_batch_size": BATCH},
    }


def gradients_rank(group, folder, sections):
    """Loss, this rank's gradients, and classifiers after a step of SGD of rate 1."""
    model, objective = an_objective(group, folder, sections)
    batch = a_batch(group.rank(), group.size())
    use_row_keys(model, row_keys(0, batch.positions))
    outputs = tuple(x for x in model(*objective.inputs(batch)) if x is not None)
    loss = objective.loss(outputs, batch, 2)
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters()}
    before = after = None
    if objective.rows is not None:
        before = objective.rows.optimizer.tables()["rows"].clone()
        objective.after_step(1.0, applied=True)
        after = objective.rows.optimizer.tables()["rows"]
    numbers = objective.numbers(tuple(x.detach() for x in outputs))
    return float(loss.detach()), found, before, after, numbers


def dense_loss(loss, queries, labels, scale, bias, lists, label_ids, drawn, weights):
    """Float64, autograd, one process: (B, d) against (m, d) with every mask written out."""
    cosines = queries @ labels.T
    logits = scale * cosines
    total = queries.new_zeros(())
    for i in range(len(queries)):
        own = set(lists.row(i))
        negative = torch.tensor([int(label) not in own for label in label_ids])
        pulls = own if drawn is None or loss == "one_vs_all" else {int(drawn[i])}
        places = [j for j, label in enumerate(label_ids.tolist()) if label in pulls]
        if not places:
            continue
        if loss == "one_vs_all":
            targets = torch.zeros(len(label_ids), dtype=logits.dtype)
            targets[places] = 1
            total = total + weights[i] * F.binary_cross_entropy_with_logits(
                logits[i] + bias, targets, reduction="sum"
            )
            continue
        others = logits[i][negative]
        if loss == "topk_hinge":
            hardest = others.sort(descending=True).values[:10]
            terms = [(hardest - logits[i, j] + 0.3).clamp(min=0).sum() / 10 for j in places]
        else:
            terms = [
                torch.logsumexp(torch.cat([logits[i, j][None], others]), 0) - logits[i, j]
                for j in places
            ]
        total = total + weights[i] * sum(terms) / len(terms)
    return total / len(queries)


CASES = [
    ("decoupled", "texts", "all", {"token_dropout": 0.3}),
    ("decoupled", "classifiers", "all", {}),
    ("info_nce", "texts", "batch", {"shared_towers": False, "token_dropout": 0.3}),
    ("topk_hinge", "texts", "batch", {}),
    ("decoupled", "classifiers", "batch", {}),
    ("one_vs_all", "classifiers", "all", {}),
    ("one_vs_all", "texts", "batch", {}),
    ("decoupled", "texts", "batch", {"explicit": 2, "token_dropout": 0.3}),
    ("topk_hinge", "texts", "batch", {"explicit": 1, "weights": "w.parquet"}),
    ("decoupled", "classifiers", "all", {"weights": "w.parquet"}),
    ("one_vs_all", "texts", "batch", {"weights": "w.parquet"}),
]


@pytest.mark.parametrize(("loss", "rows", "over", "model"), CASES, ids=str)
def test_gradients_are_the_global_losses_on_any_number_of_ranks(tmp_path, loss, rows, over, model):
    sections = sections_of(loss, rows, over, **model)
    config = text_config(tmp_path, **sections)
    net, objective = an_objective(None, tmp_path, sections)
    batch, lists = a_batch(0, 1), label_lists()
    asked = objective._ask(batch)
    use_row_keys(net, row_keys(0, batch.positions))
    scale, raw = None, None
    if rows == "texts":
        label_ids = (
            torch.arange(NUM_LABELS) if over == "all" else asked.drawn[asked.drawn >= 0].unique()
        )
        if config.negatives.explicit:  # all that were brought along count, for every query
            assert len(asked.label_ids) > len(label_ids)
            label_ids = asked.label_ids
        keys = objective._label_keys(batch, label_ids)
        queries, labels, scale, bias = net(batch.texts, label_tokens()[label_ids], keys)
    else:
        label_ids = torch.arange(NUM_LABELS) if over == "all" else asked.positives.labels.unique()
        raw = objective.rows.optimizer.tables()["rows"][label_ids].clone().requires_grad_()
        queries, _, scale, bias = net(batch.texts)
        labels = F.normalize(raw, dim=1)
    scale = torch.ones_like(scale) if loss == "topk_hinge" else scale
    of_batch = lists.of(batch.ids.numpy())
    expected = dense_loss(
        loss, queries, labels, scale, bias, of_batch, label_ids, asked.drawn,
        batch.positions % 4 / 2 if config.negatives.weights else torch.ones(BATCH),
    )  # fmt: skip
    expected.backward()
    for world_size in (1, 3):
        found = run_ranks(world_size, gradients_rank, tmp_path, sections)
        values, gradients, before, after, numbers = zip(*found, strict=True)
        assert np.mean(values) == pytest.approx(float(expected.detach()), rel=1e-10)
        for name, parameter in net.named_parameters():
            if parameter.grad is not None:
                mean = sum(g[name] for g in gradients) / world_size
                torch.testing.assert_close(mean, parameter.grad, rtol=1e-8, atol=1e-11)
        if raw is not None:
            moved = torch.cat(before) - torch.cat(after)
            torch.testing.assert_close(moved[label_ids], raw.grad, rtol=1e-8, atol=1e-11)
            untouched = np.setdiff1d(np.arange(NUM_LABELS), label_ids.numpy())
            assert not moved[untouched].any()
            norm = float(raw.grad.norm())
            assert numbers[0]["centers_grad_norm"] == pytest.approx(norm, rel=1e-6)
        empty = float((of_batch.counts == 0).mean())
        assert numbers[0]["unlabelled"] == pytest.approx(empty) and 0 < empty < 1
        assert len({str(n) for n in numbers}) == 1


def test_a_positive_is_drawn_by_seed_and_place_alone(tmp_path):
    _, objective = an_objective(None, tmp_path, sections_of("info_nce", "texts", "batch"))
    lists, seen = label_lists(), {}
    for step in range(300):
        batch = a_batch(0, 1, step)
        drawn = objective._ask(batch).drawn
        for sample, label, position in zip(
            batch.ids.tolist(), drawn.tolist(), batch.positions.tolist(), strict=True
        ):
            own = lists.row(sample)
            assert (label in own) if own else label == -1
            seen.setdefault(sample, []).append(label)
            assert position // BATCH == step
        half = a_batch(1, 2, step)
        assert objective._ask(half).drawn.tolist() == drawn[1::2].tolist()
    for sample, labels in seen.items():
        own = lists.row(sample)
        for label in own:
            share = labels.count(label) / len(labels)
            assert share == pytest.approx(1 / len(own), abs=4.5 / len(labels) ** 0.5 / 2)


def test_a_label_of_each_explicit_negative_is_drawn_by_seed_and_place_alone(tmp_path):
    sections = sections_of("info_nce", "texts", "batch", explicit=2)
    _, objective = an_objective(None, tmp_path, sections)
    lists, negatives = label_lists(), a_plan(tmp_path).negatives_of(np.arange(NUM_TEXTS))
    for step in range(NUM_TEXTS // BATCH):
        batch = a_batch(0, 1, step)
        own = objective._ask(batch).drawn
        brought = set(objective._draw_negatives(batch).tolist()) - {-1}
        mine = negatives[batch.positions]
        for sample in mine[mine >= 0].tolist():
            assert not lists.row(sample) or brought & {*lists.row(sample)}
        assert brought <= {label for s in mine[mine >= 0].tolist() for label in lists.row(s)}
        asked = set(objective._ask(batch).label_ids.tolist())
        assert asked == brought | {*own[own >= 0].tolist()}
        of_ranks = [set(objective._ask(a_batch(r, 3, step)).label_ids.tolist()) for r in range(3)]
        assert set().union(*of_ranks) == asked
    assert objective.most_rows(4) == 12 and objective.most_rows(5) == NUM_LABELS


def test_labels_of_a_step_share_masks_over_ranks_and_differ_over_steps(tmp_path):
    _, objective = an_objective(None, tmp_path, sections_of("decoupled", "texts", "all"))
    ids = torch.arange(NUM_LABELS)
    first = objective._label_keys(a_batch(0, 1, 3), ids)
    assert torch.equal(first, objective._label_keys(a_batch(1, 2, 3), ids))
    later = objective._label_keys(a_batch(0, 1, 4), ids)
    queries = row_keys(objective._seed, torch.arange(100 * BATCH))
    assert len({*first.tolist(), *later.tolist(), *queries.tolist()}) == 2 * NUM_LABELS + len(
        queries
    )


def stored_rows_rank(group, folder, config, steps):
    """Some steps on random gradients, stored by this rank."""
    from trainer.durable import write_file

    rows = LabelRows(NUM_LABELS, DIM, group, config=config, seed=2)
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        wanted = torch.randn(NUM_LABELS, DIM, generator=generator)
        ids = torch.randperm(NUM_LABELS, generator=generator)[:6].sort().values
        ids = ids[(ids >= rows.part.start) & (ids < rows.part.stop)]
        taken = rows.take(ids if step % 2 else None)
        (taken.unit * wanted[taken.ids]).sum().backward()
        rows.step(0.1)
    before = copy.deepcopy(rows.optimizer.tables())
    unit = rows.unit_rows()
    for name, table in rows.optimizer.tables().items():
        assert torch.equal(table, before[name]), "an evaluation moved a row"
    for name, item in state_files(rows, None).items():
        write_file(folder / name, item)
    return unit


@pytest.mark.parametrize("mode", ["lazy", "exact"])
def test_rows_are_stored_by_label_and_read_at_any_world_size(tmp_path, mode):
    from trainer.config import dump_config

    centers = {"mode": mode, "weight_decay": 0.1}
    config = text_config(tmp_path, centers=centers, labels={"rows": "classifiers"})
    stored = tmp_path / "checkpoint"
    unit = torch.cat(run_ranks(3, stored_rows_rank, stored, config.centers, 5))
    alone = run_ranks(1, stored_rows_rank, tmp_path / "other", config.centers, 5)[0]
    torch.testing.assert_close(unit, alone, rtol=1e-5, atol=1e-6)
    (stored / "config.toml").write_text(dump_config(config))
    for world_size in (1, 2, 5):
        parts = [Part.of_rank(NUM_LABELS, rank, world_size) for rank in range(world_size)]
        read = torch.cat([read_label_rows(stored, part) for part in parts])
        torch.testing.assert_close(read, unit, rtol=1e-5, atol=1e-6)
    with pytest.raises(ConfigError, match="rows of 13 labels, the label table 14"):
        read_label_rows(stored, Part(0, 7, 14))
    rows = LabelRows(NUM_LABELS, DIM, config=config.centers, seed=9, draw=False)
    load_state(rows, stored)
    torch.testing.assert_close(rows.unit_rows(), unit, rtol=1e-5, atol=1e-6)
    assert rows.steps == 5


def test_rows_that_were_embedded_are_as_long_as_drawn_ones():
    rows = LabelRows(NUM_LABELS, DIM, config=CentersConfig())
    unit = F.normalize(torch.randn(NUM_LABELS, DIM), dim=1)
    drawn = float(rows.optimizer.tables()["rows"].norm(dim=1).mean())
    rows.start_from(unit)
    torch.testing.assert_close(rows.unit_rows(), unit)
    assert float(rows.optimizer.tables()["rows"].norm(dim=1).mean()) == pytest.approx(
        drawn, rel=0.3
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"subcenters": 2}, "a label has one row"),
        ({"sample_rate": 0.5}, 'labels.over = "batch"'),
        ({"init": "runs/x"}, "labels.init"),
        ({"quarter_turns": True}, "quarter_turns"),
    ],
)
def test_options_of_identities_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        LabelRows(NUM_LABELS, DIM, config=CentersConfig(**options))


def test_two_steps_of_one_loss_are_an_error():
    rows = LabelRows(NUM_LABELS, DIM, config=CentersConfig())
    rows.take(None).unit.sum().backward()
    rows.discard()
    with pytest.raises(RuntimeError, match="no loss has been back-propagated"):
        rows.step(0.1)
