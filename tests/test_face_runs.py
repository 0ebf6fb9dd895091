"""Runs against class centers: they learn, and resume exactly on any number of ranks."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from ranks import run_ranks
from tiny_faces import NUM_CLASSES, face_config, write_faces
from tiny_runs import read_losses, read_samples, train_rank

STEPS, KILLED_AFTER = 9, 5
EXACT_SGD = {"mode": "exact", "optimizer": "sgd", "weight_decay": 5e-3}
LAZY_ADAMW = {"optimizer": "adamw", "lr_scale": 1.0, "weight_decay": 0.1}
SAMPLED = {"sample_rate": 0.8}
RESUMED = [
    (2, 2, 0, EXACT_SGD | SAMPLED),
    (2, 2, 2, LAZY_ADAMW),
    (2, 1, 1, EXACT_SGD | SAMPLED),
    (2, 3, 3, EXACT_SGD | SAMPLED),
    (2, 3, 1, LAZY_ADAMW | {"subcenters": 2}),
    (1, 2, 0, {"mode": "exact", "optimizer": "adamw", **SAMPLED}),
]


def lines_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("first", "then", "stage", "centers"), RESUMED, ids=str)
def test_a_killed_run_goes_on_with_its_centers(tmp_path, first, then, stage, centers):
    sections = {
        "zero": {"stage": stage},
        "centers": centers,
        "train": {"duration": f"{STEPS} steps", "ema": 0.9},
        "checkpoint": {"every": "3 steps"},
        "model": {"dropout": 0.1},
        "optim": {"name": "sgd", "lr": 0.03} if stage != 1 else {},  # AdamW at stage 1
    }
    config = face_config(tmp_path, **sections)
    run_ranks(first, train_rank, config, str(tmp_path / "whole"))
    with pytest.raises(AssertionError, match="exit codes"):
        run_ranks(first, train_rank, config, str(tmp_path / "run"), KILLED_AFTER)
    assert run_ranks(then, train_rank, config, str(tmp_path / "run")) == [True] * then
    assert "step-00000003" in (tmp_path / "run" / "log" / "rank-0000.log").read_text()
    assert read_samples(tmp_path / "run") == read_samples(tmp_path / "whole")
    expected, found = read_losses(tmp_path / "whole"), read_losses(tmp_path / "run")
    assert sorted(found) == list(range(1, STEPS + 1))
    if first == then:
        assert found == expected
    for step, loss in found.items():
        assert loss == pytest.approx(expected[step], abs=2e-4), f"step {step}"


@pytest.mark.parametrize("stage", [0, 3])
def test_a_step_in_chunks_is_the_whole_step(tmp_path, stage):
    """One loss over all chunks, dropout included; without a batch norm, whose batch is a chunk."""
    found = {}
    for ranks, chunk_size in ((1, 0), (1, 5), (2, 3)):
        config = face_config(
            tmp_path,
            model={"bn_neck": False, "dropout": 0.1},
            centers=EXACT_SGD | SAMPLED,
            zero={"stage": stage},
            train={"duration": "4 steps", "chunk_size": chunk_size},
        )
        run = tmp_path / f"{ranks}-{chunk_size}"
        run_ranks(ranks, train_rank, config, str(run))
        found[ranks, chunk_size] = read_losses(run)
    whole = found.pop((1, 0))
    for losses in found.values():
        assert losses == {step: pytest.approx(loss, abs=1e-4) for step, loss in whole.items()}


def test_it_learns_and_says_how_far_it_is(tmp_path):
    config = face_config(tmp_path, train={"duration": "40 steps"})
    run_ranks(2, train_rank, config, str(tmp_path / "run"))
    lines = [line for line in lines_of(tmp_path / "run") if "loss" in line]
    first, last = lines[0], lines[-1]
    assert last["loss"] < 0.5 * first["loss"]
    assert last["target_cosine"] > 0.4 > abs(first["target_cosine"])
    assert last["centers_grad_norm"] > 0 and last["embedding_norm"] > 0


@pytest.mark.parametrize("correction", [True, False])
def test_the_sample_rate_moves_the_loss_by_what_is_predicted(tmp_path, correction):
    """ln((C - P) / n) of the negatives without the correction; nothing with it."""
    train = {"duration": "1 steps", "global_batch_size": 4}
    losses = {}
    for rate in (1.0, 0.6):
        config = face_config(
            tmp_path,
            train=train,
            loss={"name": "softmax", "scale": 1e-3, "margin": None},
            centers={"sample_rate": rate, "correction": correction},
        )
        run = tmp_path / f"{rate}"
        run_ranks(1, train_rank, config, str(run))
        losses[rate] = read_losses(run)[1]
        assert losses[rate] > 0
    seen = len({key.split(":")[1].split("_")[0] for key in read_samples(tmp_path / "1.0")[1]})
    negatives = int(0.6 * NUM_CLASSES) - seen
    expected = np.log(seen + negatives) if not correction else np.log(NUM_CLASSES)
    assert losses[1.0] == pytest.approx(np.log(NUM_CLASSES), abs=2e-3)
    assert losses[0.6] == pytest.approx(expected, abs=2e-3)


@pytest.mark.parametrize("loss", ["adaface", "elastic_arcface_plus"])
def test_losses_that_carry_or_draw_something_resume_too(tmp_path, loss):
    sections = {"loss": {"name": loss, "margin": None, "scale": 8.0}}
    config = face_config(tmp_path, train={"duration": "6 steps"}, **sections)
    run_ranks(2, train_rank, config, str(tmp_path / "whole"))
    with pytest.raises(AssertionError, match="exit codes"):
        run_ranks(2, train_rank, config, str(tmp_path / "run"), 5)
    run_ranks(2, train_rank, config, str(tmp_path / "run"))
    assert read_losses(tmp_path / "run") == read_losses(tmp_path / "whole")
    copy = tmp_path / "one"
    shutil.copytree(tmp_path / "run" / "checkpoints", copy / "checkpoints")
    shutil.rmtree(copy / "checkpoints" / "step-00000006")
    run_ranks(1, train_rank, config, str(copy))
    expected = read_losses(tmp_path / "whole")
    for step, value in read_losses(copy).items():
        assert value == pytest.approx(expected[step], abs=1e-3)


def turning_rank(group, config):
    """What the objective makes of a batch whose images tell which way is up."""
    import torch

    from data.loader import Batch
    from trainer.centers import ClassCenters
    from trainer.centers.start import assign_rows
    from trainer.hardness import Hardness
    from trainer.objectives.centers import CenterObjective
    from trainer.ranks import Ranks

    corner = torch.zeros(64, 3, 8, 8, dtype=torch.uint8)
    corner[:, :, 0, 0] = 9
    numbers = torch.arange(64)
    batch = Batch(corner, numbers[:, None], numbers, numbers, numbers % 5, numbers + 1000, [])
    centers = ClassCenters(20, 16, group, seed=3)
    ranks = Ranks(group, group.rank(), group.size(), group.rank())
    never = Hardness(0, None, due=lambda _: False)
    objective = CenterObjective(centers, assign_rows(None, 20), ranks, hardness=never, turns=4)
    (images,) = objective.inputs(batch)
    seen = {}
    objective.centers = lambda rows, labels, *_: seen.update(labels=labels)
    objective.centers.seed = 3
    objective.loss((torch.zeros(64, 16),), batch, 0)
    assert (corner[:, :, 0, 0] == 9).all()  # the batch itself is left as it was
    places = [(0, 0), (7, 0), (7, 7), (0, 7)]  # of the corner, turned left by 0 to 3 quarters
    turns = [[int(image[0, y, x]) for y, x in places].index(9) for image in images]
    return turns, seen["labels"].tolist(), batch.labels.tolist()


def test_a_turned_character_is_another_class(tmp_path):
    ((turns, labels, plain),) = run_ranks(1, turning_rank, None)
    assert labels == [4 * label + turn for label, turn in zip(plain, turns, strict=True)]
    assert min(turns.count(turn) for turn in range(4)) >= 5
    config = face_config(tmp_path, centers={"quarter_turns": True}, train={"duration": "4 steps"})
    run_ranks(2, train_rank, config, str(tmp_path / "two"))
    run_ranks(1, train_rank, config, str(tmp_path / "one"))
    two, one = read_losses(tmp_path / "two"), read_losses(tmp_path / "one")
    assert one == {step: pytest.approx(loss, abs=2e-4) for step, loss in two.items()}


def config_error(group, config, run):
    from data.errors import DataError
    from trainer.config import ConfigError

    try:
        train_rank(group, config, run)
    except (ConfigError, DataError) as error:
        return str(error)
    return ""


def test_what_does_not_fit_is_one_error_before_the_first_step(tmp_path):
    few = face_config(tmp_path, centers={"num_classes": 5})
    for text in run_ranks(2, config_error, few, str(tmp_path / "a")):
        assert "5" in text and "num_classes" in text
    option = face_config(tmp_path, loss={"name": "cosface", "margin": None, "gradient": "detached"})
    (text,) = run_ranks(1, config_error, option, str(tmp_path / "b"))
    assert "gradient" in text
    alone = write_faces(tmp_path / "alone", num_classes=1, each=24)
    one = face_config(tmp_path, data={"shards": alone})
    for text in run_ranks(2, config_error, one, str(tmp_path / "c")):
        assert "has one identity, and a softmax needs at least 2" in text
