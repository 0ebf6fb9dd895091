"""A rank that holds the others up is named, with its node and the part of the step."""

import os
import signal
import subprocess
import sys

from ranks import run_ranks
from tiny_runs import tiny_config, train_rank

from trainer.events import read_events
from trainer.stragglers import Straggler, find_straggler


def rows(*pairs):
    return [{"data_wait": wait, "towers": towers} for wait, towers in pairs]


def test_the_rank_that_costs_most_is_found():
    assert find_straggler(rows((1, 5), (1, 5), (1, 5)), 10) is None
    assert find_straggler(rows((1, 5), (1.2, 9), (3, 5)), 10) == Straggler(1, "towers", 4.0, 1.8)
    assert find_straggler(rows((1, 5), (9, 5), (2, 9)), 10) == Straggler(1, "data_wait", 7.0, 4.5)
    # Twice as slow, but in what hardly counts; and much time, but little beside the others'.
    assert find_straggler(rows((0.01, 5), (0.02, 5)), 10) is None
    assert find_straggler(rows((1, 50), (1, 60)), 100) is None
    # No time at all is nobody's fault.
    assert find_straggler(rows((0, 5), (3, 5)), 10) == Straggler(1, "data_wait", 3.0, 3e9)


STOP_AND_GO = """
import os, signal, sys, time
while True:
    os.kill(int(sys.argv[1]), signal.SIGSTOP); time.sleep(0.06)
    os.kill(int(sys.argv[1]), signal.SIGCONT); time.sleep(0.03)
"""


def _train_slowed(group, config, run):
    """Rank 1 is stopped for two thirds of the time, as by a neighbour that takes its cores."""
    other = None
    if group.rank() == 1:
        other = subprocess.Popen([sys.executable, "-c", STOP_AND_GO, str(os.getpid())])
    try:
        return train_rank(group, config, run)
    finally:
        if other is not None:
            other.send_signal(signal.SIGKILL)
            other.wait()


def test_a_slowed_rank_is_named(tmp_path):
    config = tiny_config(
        tmp_path,
        train={"duration": "24 steps", "global_batch_size": 32},
        log={"straggler_window": 0.5},
    )
    run_ranks(2, _train_slowed, config, str(tmp_path / "run"))
    told = [event for event in read_events(tmp_path / "run") if event["event"] == "straggler"]
    assert told, "the slowed rank was not found"
    named = max(told, key=lambda event: event["lost_s"])
    assert named["rank"] == 1 and named["node"] and named["part"] in ("data_wait", "towers")
    text = (tmp_path / "run" / "log" / "rank-0000.log").read_text()
    assert f"rank 1 on {named['node']} is" in text and "waits" in text
