"""Ranks that watch each other: who is silent is named, who is busy is waited for.

Real processes that are killed, stopped and continued; a timeout of three seconds.
"""

import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks

from trainer.beats import Beat, BeatFile
from trainer.events import read_events
from trainer.flight import is_lost_peer, recent_collectives, record_collectives, shorten
from trainer.ranks import Ranks
from trainer.sections import LaunchConfig
from trainer.watch import RANK_LOST, Progress, watching

TIMEOUT_S = 3.0
CONFIG = LaunchConfig(timeout=TIMEOUT_S, start_timeout=60.0)


def watched(group, folder: str, what: str) -> str:
    """Take three steps, then let rank 1 do `what`, while rank 0 waits for it."""
    run = Path(folder)
    (run / "log").mkdir(parents=True, exist_ok=True)
    sys.stderr = (run / f"said-{group.rank()}").open("w")
    with watching(run, Ranks(group, group.rank(), group.size()), CONFIG) as progress:
        for step in range(1, 4):
            dist.all_reduce(torch.ones(7), group=group)
            progress.reached(step)
        if group.rank() == 1:
            (run / "begun").touch()
            ACTIONS[what](progress)
        dist.all_reduce(torch.ones(5), group=group)
        progress.reached(4)
    return "went on"


def stop_itself(_progress: Progress) -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def kill_itself(_progress: Progress) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def hang(progress: Progress) -> None:
    progress.mark("data_wait")
    time.sleep(60)


def raise_error(_progress: Progress) -> None:
    raise ValueError("no such shard: x-9.tar")


def compute_long(progress: Progress) -> None:
    """An evaluation without a word, that uses its core."""
    with progress.long("evaluation"):
        until = time.monotonic() + 3 * TIMEOUT_S
        while time.monotonic() < until:
            sum(range(1000))


def wait_for_disk(progress: Progress) -> None:
    """A save on a disk that takes its time: nothing moves, and it is in no collective."""
    with progress.long("save"):
        time.sleep(2 * TIMEOUT_S)


def take_slow_steps(progress: Progress) -> None:
    for part in ("data_wait", "towers", "loss", "backward"):
        time.sleep(0.6 * TIMEOUT_S)
        progress.mark(part)


ACTIONS = {
    function.__name__: function
    for function in (
        *(stop_itself, kill_itself, hang, raise_error),
        *(compute_long, wait_for_disk, take_slow_steps),
    )
}


def said(run: Path, rank: int) -> str:
    return (run / f"said-{rank}").read_text()


def log(run: Path, rank: int) -> str:
    return (run / "log" / f"rank-{rank:04d}.log").read_text()


def lose(tmp_path: Path, what: str) -> str:
    """Run until ranks are lost; what the test's parent says of them."""
    with pytest.raises(AssertionError) as caught:
        run_ranks(2, watched, str(tmp_path), what, timeout_s=30)
    return str(caught.value)


def test_a_stopped_rank_is_silent(tmp_path):
    assert str(RANK_LOST) in lose(tmp_path, "stop_itself")
    [event] = read_events(tmp_path)
    assert event["event"] == "lost" and event["ranks"] == [1] and event["step"] == 3
    assert event["why"] == "no sign of life for 3 s"
    begun = (tmp_path / "begun").stat().st_mtime
    assert TIMEOUT_S - 1 < event["time"] - begun < TIMEOUT_S + 3
    assert event["last_collective"]["name"] == "gloo:all_reduce"
    assert event["last_collective"]["sizes"] == [[5]] and not event["last_collective"]["done"]
    assert "gloo:all_reduce of [5]" in log(tmp_path, 0)
    assert said(tmp_path, 0).startswith("nsphere, rank 0: lost rank 1 (")
    assert said(tmp_path, 0).count("\n") == 1
    assert "in watched" in log(tmp_path, 0)


def test_a_killed_rank_is_noticed_at_once(tmp_path):
    assert "exit codes" in lose(tmp_path, "kill_itself")
    [event] = read_events(tmp_path)
    assert event["time"] - (tmp_path / "begun").stat().st_mtime < TIMEOUT_S
    assert event["ranks"] == [1] and event["why"].startswith("the connection to a peer broke (")
    assert "Connection" in log(tmp_path, 0) and "Traceback" not in said(tmp_path, 0)


def test_a_rank_that_hangs_names_itself_and_all_write_their_stacks(tmp_path):
    lose(tmp_path, "hang")
    [event] = read_events(tmp_path)
    assert event["ranks"] == [1] and "in its own code" in event["why"]
    assert "'data_wait' of step 3" in event["last_heard"]["1"]
    assert "in hang" in log(tmp_path, 1)
    assert "called by rank 1" in log(tmp_path, 0) and "in watched" in log(tmp_path, 0)
    assert not said(tmp_path, 0)


def test_a_rank_with_its_own_error_is_not_lost(tmp_path):
    told = lose(tmp_path, "raise_error")
    assert "ValueError: no such shard: x-9.tar" in told
    [event] = read_events(tmp_path)
    assert event["event"] == "end" and event["how"] == "failed"
    assert event["why"] == "failed: ValueError: no such shard: x-9.tar"
    assert "ended by its own error" in said(tmp_path, 0) and "lost" not in said(tmp_path, 0)


@pytest.mark.parametrize("what", ["compute_long", "wait_for_disk", "take_slow_steps"])
def test_a_busy_rank_is_waited_for(tmp_path, what):
    assert run_ranks(2, watched, str(tmp_path), what) == ["went on", "went on"]
    assert not read_events(tmp_path)


def suspended(group, folder: str) -> str:
    """All ranks are stopped for longer than the timeout, and go on: a suspended job."""
    run = Path(folder)
    (run / "log").mkdir(parents=True, exist_ok=True)
    with watching(run, Ranks(group, group.rank(), group.size()), CONFIG) as progress:
        progress.reached(1)
        dist.barrier(group=group)
        if os.fork() == 0:  # wakes its parent
            parent = os.getppid()
            time.sleep(0.5)
            os.kill(parent, signal.SIGSTOP)
            time.sleep(2 * TIMEOUT_S)
            os.kill(parent, signal.SIGCONT)
            os._exit(0)
        time.sleep(1.0)
        dist.barrier(group=group)
    return "went on"


def test_a_suspended_job_goes_on(tmp_path):
    assert run_ranks(2, suspended, str(tmp_path)) == ["went on", "went on"]


def test_a_process_alone_that_hangs_leaves(tmp_path):
    with pytest.raises(AssertionError, match=r"exit codes of the ranks: \[86\]"):
        run_ranks(1, hang_alone, str(tmp_path))
    [event] = read_events(tmp_path)
    assert event["ranks"] == [0] and "in its own code" in event["why"]
    assert "in hang_alone" in log(tmp_path, 0)


def hang_alone(group, folder: str) -> None:
    run = Path(folder)
    (run / "log").mkdir(parents=True)
    with watching(run, Ranks(group), CONFIG) as progress:
        progress.reached(1)
        time.sleep(30)


def test_a_run_started_anew_ends_the_old_ranks(tmp_path):
    """A host that was cut off comes back and finds another life of the run."""
    with pytest.raises(AssertionError, match=r"exit codes of the ranks: \[86\]"):
        run_ranks(1, lose_its_place, str(tmp_path))
    assert "started anew" in log(tmp_path, 0) and not read_events(tmp_path)


def lose_its_place(group, folder: str) -> None:
    run = Path(folder)
    (run / "log").mkdir(parents=True)
    with watching(run, Ranks(group), CONFIG) as progress:
        progress.reached(1)
        BeatFile.open_together(run / "log" / ".beats", Ranks(group))  # as the new life does
        for _ in range(50):
            time.sleep(0.2)
            progress.mark("step")


def test_a_mark_costs_next_to_nothing():
    progress, begun = Progress(), time.perf_counter()
    for _ in range(100_000):
        progress.mark("towers")
    assert (time.perf_counter() - begun) / 100_000 < 5e-6


def test_pages_of_the_file(tmp_path):
    beats = BeatFile.open_together(tmp_path / "beats", Ranks())
    assert beats.read() == [] and beats.called() is None
    beats.write(Beat(0, "host", 7, part="x" * 9000))  # torn: as if it were not there
    assert beats.read() == []
    beat = Beat(0, "host", 7, count=3, part="loss", step=2, idle_s=4.0)
    beats.write(beat)
    assert beats.read() == [beat] and beat.place == "4.0 s after 'loss' of step 2"
    assert beats.call(0, "why") and not beats.call(0, "again")
    assert beats.called() == {"rank": 0, "why": "why"}


def test_what_is_a_lost_peer():
    text = "[/x/gloo/pair.cc:5] Connection closed by peer [10.0.0.2]:99. This is typically caused"
    assert is_lost_peer(RuntimeError(text)) and not is_lost_peer(ValueError(text))
    assert not is_lost_peer(RuntimeError("shapes do not match"))
    assert shorten(RuntimeError(text)) == "Connection closed by peer [10.0.0.2]:99"
    environment: dict[str, str] = {}
    record_collectives(environment)
    assert int(environment["TORCH_FR_BUFFER_SIZE"]) > 0
    assert isinstance(recent_collectives(), list)
