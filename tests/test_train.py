"""Whole small runs: each option of a run does what it says, on more than one rank."""

import json
import logging
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from tiny_runs import read_losses, read_samples, tiny_config, train_rank

from trainer.checkpoint import load_weights
from trainer.config import ConfigError, parse_config
from trainer.run import check_config, open_run


def run(folder: Path, name: str, world_size: int, **sections: dict) -> Path:
    run_ranks(world_size, train_rank, tiny_config(folder, **sections), str(folder / name))
    return folder / name


def newest_weights(path: Path, *, ema: bool = False) -> dict[str, torch.Tensor]:
    step = max((path / "checkpoints").glob("step-*"))
    return load_weights(step, ema=ema)


def test_saves_in_the_background_are_the_same_run(tmp_path):
    plain = run(tmp_path, "plain", 2)
    behind = run(tmp_path, "behind", 2, checkpoint={"background": True})
    assert read_losses(behind) == read_losses(plain)
    saved, expected = newest_weights(behind), newest_weights(plain)
    assert all(torch.equal(saved[name], expected[name]) for name in expected)


def test_siglip_is_the_same_run_on_one_rank_and_on_three(tmp_path):
    sections = {"loss": {"name": "siglip", "visiting": "ring"}}
    one, three = (run(tmp_path, f"r{n}", n, **sections) for n in (1, 3))
    losses, others = read_losses(one), read_losses(three)
    assert losses.keys() == others.keys() and losses[12] < losses[1]
    for step, loss in losses.items():
        assert others[step] == pytest.approx(loss, abs=1e-4)
    assert read_samples(one) == read_samples(three)
    line = json.loads((one / "metrics.jsonl").read_text().splitlines()[0])
    assert line["bias"] == pytest.approx(-10, abs=0.1)


@pytest.mark.parametrize("stage", [1, 3])
def test_a_locked_tower_does_not_move_and_resumes(tmp_path, stage):
    sections = {"model": {"lock_image": True}, "zero": {"stage": stage}}
    whole = run(tmp_path, "whole", 2, **sections)
    config = tiny_config(tmp_path, **sections)
    with pytest.raises(AssertionError):
        run_ranks(2, train_rank, config, str(tmp_path / "killed"), 6)
    run_ranks(1, train_rank, config, str(tmp_path / "killed"))
    for step, loss in read_losses(whole).items():
        assert read_losses(tmp_path / "killed")[step] == pytest.approx(loss, abs=1e-5)
    short = run(tmp_path, "short", 1, train={"duration": "1 steps"}, **sections)
    early, late = newest_weights(short), newest_weights(whole)
    moved = {name for name in late if not torch.equal(early[name], late[name])}
    assert moved and not any(name.startswith("clip.visual") for name in moved)


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_averaged_weights_follow_the_formula(tmp_path, stage):
    sections = {"checkpoint": {"every": "1 steps", "keep_last": 99}, "train": {"ema": 0.9}}
    path = run(tmp_path, "ema", 2, zero={"stage": stage}, **sections)
    steps = sorted((path / "checkpoints").glob("step-*"))
    average = None
    for number, step in enumerate(steps, start=1):
        weight = load_weights(step)["clip.text_projection"].double()
        if average is None:
            average = load_weights(step, ema=True)["clip.text_projection"].double()
            continue
        decay = min(0.9, (1 + number) / (10 + number))
        average = decay * average + (1 - decay) * weight
    found = newest_weights(path, ema=True)["clip.text_projection"].double()
    torch.testing.assert_close(found, average, rtol=1e-5, atol=1e-7)
    assert not torch.equal(found, newest_weights(path)["clip.text_projection"].double())


def test_the_scale_is_clamped_where_the_optimizer_keeps_it(tmp_path):
    for stage in (0, 1, 3):
        sections = {"model": {"max_scale": 14.5, "init_scale": 14.4}, "zero": {"stage": stage}}
        path = run(tmp_path, f"s{stage}", 2, optim={"lr": 0.05, "clip_norm": 0.0}, **sections)
        lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
        scales = [line["scale"] for line in lines if "loss" in line]
        assert max(scales) <= 14.5 + 1e-4
        assert len(set(scales)) > 1


def poisoned_rank(group, config, run: str, bad_steps: tuple[int, ...]) -> str:
    """Train with a loss that is NaN on rank 1 in some steps; the error that ends the run, or ""."""
    from trainer import train as module
    from trainer.loop import TrainingError

    build, calls = module.build_objective, 0

    def build_poisoned(*arguments, **options):
        objective = build(*arguments, **options)
        loss = objective.loss

        def poisoned(outputs, batch, step):
            nonlocal calls
            calls += 1
            bad = calls in bad_steps and group.rank() == 1
            return loss(outputs, batch, step) * (float("nan") if bad else 1.0)

        objective.loss = poisoned
        return objective

    module.build_objective = build_poisoned
    try:
        train_rank(group, config, run)
    except TrainingError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_non_finite_gradient_of_one_rank_is_skipped_by_all(tmp_path, stage):
    config = tiny_config(tmp_path, zero={"stage": stage})
    assert run_ranks(2, poisoned_rank, config, str(tmp_path / "r"), (3, 4)) == ["", ""]
    lines = [json.loads(line) for line in (tmp_path / "r" / "metrics.jsonl").open()]
    steps = {line["step"]: line for line in lines if "loss" in line}
    assert len(steps) == 12 and steps[12]["skipped_steps"] == 2
    assert steps[3]["loss"] is None and steps[5]["loss"] > 0
    assert "step 3 skipped" in (tmp_path / "r" / "log" / "rank-0000.log").read_text()


def test_too_many_skipped_steps_name_the_last_good_checkpoint(tmp_path):
    config = tiny_config(tmp_path, train={"max_skipped": 2})
    told = run_ranks(2, poisoned_rank, config, str(tmp_path / "r"), tuple(range(6, 99)))
    for text in told:
        assert "3 steps in a row" in text and "step-00000004" in text and "optim.lr" in text


def test_sources_mixed_by_weight_are_the_same_at_any_world_size(tmp_path):
    shards = tiny_config(tmp_path).data.shards
    first, rest = shards.replace("{0..2}", "0"), shards.replace("{0..2}", "{1..2}")
    sources = [{"shards": first, "weight": 1.0}, {"shards": rest, "weight": 3.0}]
    data = {"shards": "", "sources": sources}
    one, two = (run(tmp_path, f"r{n}", n, data=data) for n in (1, 2))
    assert read_samples(one) == read_samples(two)
    keys = [key for keys in read_samples(one).values() for key in keys]
    assert sum(key.startswith("x-0") for key in keys) == pytest.approx(len(keys) / 4, abs=2)


def test_too_many_bad_samples_stop_the_run_with_their_names(tmp_path):
    folder = tmp_path / "bad"
    folder.mkdir()
    config = tiny_config(tmp_path)
    for number in range(3):
        source = Path(config.data.shards.replace("{0..2}", str(number)))
        content = bytearray(source.read_bytes())
        at = content.find(b"\xff\xd8")
        while at >= 0:  # every picture loses its header, the tar stays as it is
            content[at : at + 20] = bytes(20)
            at = content.find(b"\xff\xd8", at + 1)
        (folder / source.name).write_bytes(content)
    bad = tiny_config(tmp_path, data={"shards": str(folder / "x-{0..2}.tar")})
    with pytest.raises(AssertionError, match=r"bad|decod"):
        run_ranks(2, train_rank, bad, str(tmp_path / "r"))


def test_two_runs_cannot_share_a_folder(tmp_path):
    config = tiny_config(tmp_path)
    lock = open_run(tmp_path / "r", config)
    with pytest.raises(ConfigError, match="in use by process"):
        open_run(tmp_path / "r", config)
    lock.close()
    open_run(tmp_path / "r", config).close()
    check_config(tmp_path / "r", config, resume=True)


def test_other_data_under_the_same_names_is_refused(tmp_path):
    path = run(tmp_path, "r", 1)
    logging.getLogger("nsphere").handlers.clear()
    config = tiny_config(tmp_path)
    fewer = config.data.shards.replace("{0..2}", "{0..1}")
    other = parse_config(
        {**config.model_dump(mode="json"), "data": {"shards": fewer, "workers": 0, "chunk": 4}},
        "other",
    )
    with pytest.raises(AssertionError, match="was trained on other data"):
        run_ranks(1, train_rank, other, str(path))
