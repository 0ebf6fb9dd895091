"""Exact resume: a run that was killed and started again is the run that was never stopped."""

from pathlib import Path

import pytest
from ranks import run_ranks
from tiny_runs import read_losses, read_samples, tiny_config, train_rank

STEPS = 12


def train_undisturbed(folder: Path, world_size: int, stage: int, **sections: dict) -> Path:
    run = folder / f"whole-{world_size}-{stage}"
    config = tiny_config(folder, zero={"stage": stage}, **sections)
    assert run_ranks(world_size, train_rank, config, str(run)) == [True] * world_size
    return run


def train_killed(
    folder: Path, kill_after: int, first: int, then: int, stage: int, **sections: dict
) -> Path:
    """`first` ranks are killed after `kill_after` steps, `then` ranks go on."""
    run = folder / f"killed-{first}-{then}-{stage}"
    config = tiny_config(folder, zero={"stage": stage}, **sections)
    with pytest.raises(AssertionError, match="exit codes"):
        run_ranks(first, train_rank, config, str(run), kill_after)
    run_ranks(then, train_rank, config, str(run))
    return run


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_same_ranks_go_on_bit_identically(tmp_path, stage):
    sections = {"train": {"chunk_size": 3, "ema": 0.9}, "model": {"patch_dropout": 0.25}}
    whole = train_undisturbed(tmp_path, 2, stage, **sections)
    killed = train_killed(tmp_path, 6, 2, 2, stage, **sections)
    assert len(read_losses(whole)) == STEPS
    assert read_losses(killed) == read_losses(whole)
    assert read_samples(killed) == read_samples(whole)


@pytest.mark.parametrize(("first", "then"), [(2, 1), (1, 3), (3, 2)])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_other_ranks_go_on_with_the_same_samples(tmp_path, stage, first, then):
    whole = train_undisturbed(tmp_path, first, stage)
    killed = train_killed(tmp_path, 6, first, then, stage)
    assert read_samples(killed) == read_samples(whole)
    expected, found = read_losses(whole), read_losses(killed)
    assert found.keys() == expected.keys()
    for step, loss in found.items():
        assert loss == pytest.approx(expected[step], abs=1e-5), f"step {step}"
