"""Exact resume: a run that was killed and started again is the run that was never stopped.

Everything that could go wrong is on at once: chunks, dropout, an average of the weights, clipping.
"""

import shutil
import time
from pathlib import Path

import pytest
from ranks import run_ranks
from tiny_runs import read_losses, read_samples, tiny_config, train_rank

from trainer.config import ConfigError
from trainer.ranks import Ranks
from trainer.run import open_run_together

STEPS, KILLED_AFTER = 9, 5
SECTIONS = {
    "train": {"chunk_size": 3, "ema": 0.9, "duration": f"{STEPS} steps"},
    "model": {"patch_dropout": 0.25},
    "checkpoint": {"every": "3 steps"},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Makes each run once: `runs(world_size, stage, killed=...)` -> its folder."""
    folder, made = tmp_path_factory.mktemp("runs"), {}

    def make(world_size: int, stage: int, *, killed: bool) -> Path:
        run = folder / f"{world_size}-{stage}-{'killed' if killed else 'whole'}"
        if run in made:
            return run
        made[run] = True
        config = tiny_config(folder, zero={"stage": stage}, **SECTIONS)
        if not killed:
            run_ranks(world_size, train_rank, config, str(run))
        else:
            with pytest.raises(AssertionError, match="exit codes"):
                run_ranks(world_size, train_rank, config, str(run), KILLED_AFTER)
        return run

    return make


@pytest.mark.parametrize(
    ("first", "then", "stage"),
    [
        *((2, then, stage) for then in (2, 1) for stage in (0, 1, 2, 3)),
        *((first, then, stage) for first, then in ((1, 3), (3, 2)) for stage in (1, 3)),
    ],
)
def test_a_killed_run_goes_on_as_if_nothing_had_happened(runs, tmp_path, stage, first, then):
    whole, run = runs(first, stage, killed=False), tmp_path / "run"
    shutil.copytree(runs(first, stage, killed=True), run)
    config = tiny_config(whole.parent, zero={"stage": stage}, **SECTIONS)
    assert run_ranks(then, train_rank, config, str(run)) == [True] * then
    assert "step-00000003" in (run / "log" / "rank-0000.log").read_text()
    assert read_samples(run) == read_samples(whole)
    expected, found = read_losses(whole), read_losses(run)
    assert sorted(found) == list(range(1, STEPS + 1))
    if first == then:
        assert found == expected
    for step, loss in found.items():
        assert loss == pytest.approx(expected[step], abs=1e-4), f"step {step}"


def begin_late(group, run: str, config) -> str:
    """Rank 1 comes when rank 0 has written the folder, as on a slower node."""
    ranks = Ranks(group, group.rank(), group.size())
    try:
        if ranks.rank == 1:
            time.sleep(1.0)
        lock = open_run_together(Path(run), config, ranks, resume=False)
        if lock is not None:
            lock.close()
    except ConfigError as error:
        return str(error)
    return ""


def test_never_resume_is_asked_once_for_all_ranks(tmp_path):
    config = tiny_config(tmp_path)
    assert run_ranks(2, begin_late, str(tmp_path / "r"), config) == ["", ""]
    first, second = run_ranks(2, begin_late, str(tmp_path / "r"), config)
    assert first == second and "holds a run already and --resume=never was given" in first
