"""Going back from a loss that jumps: what a spike is, and that the run is then the one it says."""

import json
import shutil
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ranks import run_ranks
from tiny_faces import face_config
from tiny_runs import read_losses, tiny_config, train_rank

from trainer.config import ConfigError, SpikesConfig
from trainer.durable import write_file
from trainer.events import read_events
from trainer.spikes import RecentLosses, deviations, passed_over

WINDOW = 8


def recent(losses, **options) -> RecentLosses:
    found = RecentLosses(SpikesConfig(**{"threshold": 10, "window": WINDOW, **options}))
    for loss in losses:
        found = found.and_then(loss)
    return found


@given(losses=st.lists(st.floats(0.1, 10), min_size=WINDOW, max_size=40), loss=st.floats(0, 1e6))
def test_a_spike_is_far_above_the_last_losses(losses, loss):
    last = losses[-WINDOW:]
    middle = statistics.median(last)
    spread = max(1.4826 * statistics.median(abs(x - middle) for x in last), 1e-3 * middle)
    assert recent(losses).losses == tuple(last)
    assert recent(losses).has_spike(loss) == ((loss - middle) / spread > 10)


def test_no_spike_before_there_is_a_window_and_none_when_not_asked():
    assert not recent([1.0] * (WINDOW - 1)).has_spike(1e9)
    assert recent([1.0] * WINDOW).has_spike(1.02)
    assert not recent([1.0] * WINDOW, threshold=0).has_spike(1e9)
    assert not recent([1.0] * WINDOW).has_spike(-5.0)  # a lower loss is good news
    assert deviations([0.0] * WINDOW, 0.0) == 0.0


def test_batches_passed_over():
    assert passed_over(10, 1, ()) == (10,)
    assert passed_over(10, 3, (4, 9)) == (4, 8, 9, 10)
    assert passed_over(1, 8, ()) == (0, 1)


def spiky(folder, **spikes):
    """A run of 30 steps whose rule is so strict that ordinary noise is a spike now and then."""
    rule = {"threshold": 1.0, "window": 6, "skip": 2, "max_rollbacks": 50, **spikes}
    config = tiny_config(
        folder, train={"duration": "30 steps", "ema": 0.9}, optim={"lr": 1e-4}, spikes=rule
    )
    return config.model_copy(
        update={"checkpoint": config.checkpoint.model_copy(update={"keep_last": 99})}
    )


def rollbacks(run):
    return [event for event in read_events(run) if event["event"] == "rollback"]


@pytest.mark.parametrize(("world_size", "stage"), [(1, 0), (2, 1), (2, 3)])
def test_a_run_that_went_back_is_the_run_without_those_batches(tmp_path, world_size, stage):
    config = spiky(tmp_path)
    config = config.model_copy(update={"zero": config.zero.model_copy(update={"stage": stage})})
    run = tmp_path / "run"
    assert run_ranks(world_size, train_rank, config, str(run)) == [True] * world_size
    losses, events = read_losses(run), rollbacks(run)
    assert events, "no step of this run was a spike: the rule must be stricter"
    last = events[-1]
    assert set(losses) == set(range(1, 31)) - {step + 1 for step in last["skipped"]}
    assert last["to_step"] <= min(s for s in last["skipped"] if s > last["step"] - 3)

    # By hand: start from that checkpoint, told to pass over the same batches, without the rule.
    other = tmp_path / "by_hand"
    shutil.copytree(run, other)
    for name in ("metrics.jsonl", "events.jsonl", ".lock"):
        (other / name).unlink(missing_ok=True)
    for folder in (other / "checkpoints").iterdir():
        if int(folder.name.removeprefix("step-")) > last["to_step"]:
            shutil.rmtree(folder)
    checkpoint = other / "checkpoints" / f"step-{last['to_step']:08d}"
    state = json.loads((checkpoint / "state.json").read_text())
    record = write_file(checkpoint / "state.json", {**state, "passed_over": last["skipped"]})
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["files"]["state.json"] = list(record)
    write_file(checkpoint / "manifest.json", manifest)
    plain = config.model_copy(update={"spikes": SpikesConfig()})
    run_ranks(world_size, train_rank, plain, str(other))
    after = {step: loss for step, loss in losses.items() if step > last["to_step"]}
    assert read_losses(other) == after


def test_a_run_killed_after_it_went_back_is_the_same(tmp_path):
    config = spiky(tmp_path)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run_ranks(2, train_rank, config, str(whole))
    with pytest.raises(AssertionError, match="exit codes"):
        run_ranks(2, train_rank, config, str(killed), 25)
    run_ranks(2, train_rank, config, str(killed))
    assert read_losses(killed) == read_losses(whole)


def test_centers_go_back_too(tmp_path):
    rule = {"threshold": 1.0, "window": 4, "skip": 1, "max_rollbacks": 99}
    config = face_config(tmp_path, spikes=rule, checkpoint={"every": "2 steps", "keep_last": 99})
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run_ranks(2, train_rank, config, str(whole))
    assert rollbacks(whole), "no step of this run was a spike: the rule must be stricter"
    with pytest.raises(AssertionError, match="exit codes"):
        run_ranks(2, train_rank, config, str(killed), 9)
    run_ranks(2, train_rank, config, str(killed))
    assert read_losses(killed) == read_losses(whole)


def test_too_many_rollbacks_and_no_checkpoint_end_the_run(tmp_path):
    config = spiky(tmp_path, max_rollbacks=1, threshold=0.1)
    with pytest.raises(AssertionError, match=r"1 times this run went back already.*optim\.lr"):
        run_ranks(1, train_rank, config, str(tmp_path / "often"))
    config = tiny_config(
        tmp_path,
        train={"duration": "30 steps"},
        optim={"lr": 1e-4},
        spikes={"threshold": 0.1, "window": 4},
        checkpoint={"every": "30 steps"},
    )
    with pytest.raises(AssertionError, match=r"no checkpoint is from before step .*save more"):
        run_ranks(1, train_rank, config, str(tmp_path / "never"))


def test_planned_batches_are_not_gone_back_from(tmp_path):
    with pytest.raises(ConfigError, match=r"spikes\.threshold: no way back"):
        tiny_config(tmp_path, spikes={"threshold": 8}, data={"batching": "planned"})
