"""What the batch script does next, by how the ranks ended."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch.job import (
    Decision,
    Ending,
    decide,
    is_finished,
    is_over_time,
    limit,
    parse_time,
    tell_failure,
)
from launch.signals import STOPPED
from trainer.events import read_events, record_event

CASES = {
    "done": (Ending(0, asked=True), ("done", 0)),
    "done, and killed while it left": (Ending(138, finished=True, asked=True), ("done", 0)),
    # srun says 85: it ended the peers of the failed rank, and they stopped as if asked to
    "own error hidden by srun": (Ending(85, failure="2 rank 3 on n1 ended"), ("fail", 2)),
    "own error": (Ending(1), ("fail", 1)),
    "own error while SLURM ends the job": (Ending(1, failure="1 rank 0", ended=True), ("fail", 1)),
    "time limit near": (Ending(85, asked=True), ("requeue", 85)),
    "killed while it saved": (Ending(137, asked=True), ("requeue", 85)),
    "preempted": (Ending(85, preempted=True), ("requeue", 85)),
    "preempted and not done in its grace": (Ending(137, preempted=True), ("requeue", 85)),
    "asked by its owner": (Ending(85), ("requeue", 85)),
    "cancelled": (Ending(85, ended=True), ("leave", 85)),
    "cancelled, and killed after the wait": (Ending(137, ended=True), ("leave", 137)),
    "time limit without a signal": (Ending(85, ended=True, over_time=True), ("requeue", 85)),
    "killed": (Ending(137), ("restart", 137)),
    "segmentation fault": (Ending(139), ("restart", 139)),
    "peer lost": (Ending(86), ("restart", 86)),
}


@pytest.mark.parametrize("case", CASES)
def test_what_follows(case):
    ending, (word, code) = CASES[case]
    decision = decide(ending)
    assert (decision.word, decision.code) == (word, code)


def test_restarts_without_a_newer_checkpoint_are_counted(tmp_path):
    again = Decision("restart", 137, "killed")
    for step, job, expected in (
        (0, "7", "restart"),
        (0, "7", "restart"),
        (0, "7", "fail"),
        (0, "8", "restart"),  # submitted again
        (5, "7", "restart"),  # a checkpoint came
        (5, "7", "restart"),
        (5, "7", "fail"),
    ):
        (tmp_path / "checkpoints" / f"step-{step:08d}").mkdir(parents=True, exist_ok=True)
        decision = limit(again, tmp_path, job, 2)
        assert decision.word == expected
        if decision.word == "restart":
            record_event(tmp_path, "restart", {"job": job, "step": step, "why": "killed"})
    assert "2 starts in a row from step 5 brought no newer checkpoint" in decision.why
    assert "launch.max_restarts = 2" in decision.why and decision.code == 137
    # nobody's fault, and no reason to give up
    assert limit(Decision("requeue", 85, "preempted"), tmp_path, "7", 0).word == "requeue"


def test_a_run_is_finished_by_its_last_life(tmp_path):
    for event, details, finished in (
        ("start", {}, False),
        ("end", {"how": "stopped"}, False),
        ("requeue", {}, False),
        ("start", {}, False),
        ("end", {"how": "done"}, True),
        ("uploaded", {}, True),
        ("submit", {}, False),  # again, with a longer train.duration
    ):
        record_event(tmp_path, event, details)
        assert is_finished(tmp_path) == finished


def test_the_first_own_error_of_a_step_is_kept(tmp_path, monkeypatch):
    tell_failure(1)  # no batch script: nothing happens
    monkeypatch.setenv("NSPHERE_FAILURE", str(tmp_path / "failure"))
    monkeypatch.setenv("RANK", "3")
    for code in (0, 85, 86, 137, None):
        tell_failure(code)
    assert not (tmp_path / "failure").exists()
    tell_failure(2)
    tell_failure(1)
    text = (tmp_path / "failure").read_text()
    assert text.startswith("2 rank 3 on ") and text.endswith("ended with exit code 2\n")


def test_times_as_slurm_writes_them():
    for text, seconds in (
        ("90", 5400),
        ("2:30", 150),
        ("00:02:00", 120),
        ("1-12", 129600),
        ("1-12:30", 131400),
        ("2-00:00:05", 172805),
        ("soon", None),
        ("UNLIMITED", None),
    ):
        assert parse_time(text) == seconds
    assert is_over_time({"RunTime": "00:02:01", "TimeLimit": "00:02:00"})
    assert not is_over_time({"RunTime": "00:01:59", "TimeLimit": "00:02:00"})
    assert not is_over_time({"RunTime": "5-00:00:00", "TimeLimit": "UNLIMITED"})


def test_the_command_prints_a_word_and_a_code_without_slurm(tmp_path):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("SLURM")}
    done = subprocess.run(
        [sys.executable, "-P", "-m", "launch.job", str(tmp_path), "137", "--max-restarts", "1"],
        env={**environment, "PATH": "/nowhere", "NSPHERE_FAILURE": str(tmp_path / "none")},
        capture_output=True,
        text=True,
    )
    assert done.stdout == "restart 137\n"
    assert done.stderr == "nsphere: restart (a rank was killed by signal 9 (out of memory?))\n"
    (event,) = read_events(tmp_path)
    assert (event["event"], event["code"], event["step"]) == ("restart", 137, 0)


def test_the_decision_costs_no_import_of_torch():
    text = "import launch.job, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", text], check=True)


WAITING = """
import sys, time
from launch.signals import StopRequest
stop = StopRequest()
stop.install()
stop()
print("ready", flush=True)
time.sleep(60)
"""


def test_the_time_limit_does_not_cut_off_the_save_that_its_signal_began():
    """SLURM sends SIGUSR1 before the limit, SIGTERM at it and SIGKILL half a minute later."""
    with subprocess.Popen(
        [sys.executable, "-c", WAITING],
        env={**os.environ, "SLURM_JOB_ID": "7"},
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        for number, code in (
            (signal.SIGUSR1, None),
            (signal.SIGTERM, None),
            (signal.SIGTERM, 128 + signal.SIGTERM),
        ):
            process.send_signal(number)
            time.sleep(1.5)
            assert process.poll() == code


def test_a_request_during_the_start_of_python_is_not_lost():
    """The batch script starts ranks with signals blocked; a rank takes them when it can."""
    starting = WAITING.replace("\nstop()\n", "\n")  # no step yet
    held = ["env", "--block-signal=USR1,TERM", sys.executable, "-c", starting]
    with subprocess.Popen(held, stdout=subprocess.PIPE, text=True) as process:
        while int(_status(process.pid, "SigBlk"), 16) == 0:
            time.sleep(0.001)
        process.send_signal(signal.SIGUSR1)
        assert process.wait(60) == STOPPED


def _status(pid: int, name: str) -> str:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(line.split(":")[1] for line in lines if line.startswith(name))
