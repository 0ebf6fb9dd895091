"""`nsphere status`: what it says of runs in every state, without SLURM, and what it reads."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ranks import run_ranks
from tiny_runs import tiny_config, train_rank

from launch.cli import main
from launch.signals import BAD_INPUT
from launch.status import TAIL_BYTES, describe, find_runs, read_status
from trainer.config import ConfigError
from trainer.events import record_event
from trainer.lock import RunLock


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A run of 12 steps that is done."""
    folder = tmp_path_factory.mktemp("trained")
    config = tiny_config(folder, eval={"every": "6 steps"})
    shards = {"val_shards": config.data.shards}
    config = tiny_config(folder, eval={"every": "6 steps"}, data=shards)
    run_ranks(2, train_rank, config, str(folder / "run"))
    return folder / "run"


@pytest.fixture
def run(trained, tmp_path, monkeypatch) -> Path:
    """A copy of it, on a machine without SLURM."""
    monkeypatch.setenv("PATH", "/nowhere")
    return Path(shutil.copytree(trained, tmp_path / "runs" / "one"))


def test_a_run_that_is_done(run):
    facts = read_status(run)
    assert (facts["state"], facts["alive"], facts["queue"]) == ("done", False, None)
    assert (facts["step"], facts["total_steps"], facts["eta_s"]) == (12, 12, 0)
    assert facts["samples_per_s"] > 0 and facts["error"] is None
    assert facts["checkpoint"]["step"] == 12 and facts["checkpoint"]["bytes"] > 10_000
    assert facts["evaluation"]["step"] == 12 and facts["evaluation"]["num_images"] == 60
    assert (facts["starts"], facts["restarts"], facts["ranks"]) == (1, 0, 2)
    text = describe(facts)
    assert "step        12 of 12 (100%), loss " in text and "checkpoint  step 12, " in text


def test_other_things_among_the_checkpoints_are_no_obstacle(run):
    """Copies that people make, and more than eight digits, which sort before fewer."""
    newest = run / "checkpoints" / "step-00000012"
    for name in ("step-best", "step-00000012.bak", "step-100000000"):
        shutil.copytree(newest, newest.with_name(name))
    assert read_status(run)["checkpoint"]["step"] == 100_000_000


def test_a_run_that_goes_on_says_who_and_when_it_ends(run):
    _cut(run, 8)
    record_event(run, "start", {"world_size": 4, "nodes": 2, "from_step": 8, "job": "77"})
    lock = RunLock(run / ".lock")
    try:
        facts = read_status(run)
    finally:
        lock.close()
    assert facts["state"] == "running" and f"process {os.getpid()} on" in facts["owner"]
    assert (facts["step"], facts["job"]) == (8, "77") and facts["eta_s"] > 0
    assert "job         77, not known to SLURM here" in describe(facts)
    assert " left, last line " in describe(facts)


def test_an_owner_that_is_gone_or_silent_is_no_sign_of_life(run):
    _cut(run, 8)
    owner = {"host": os.uname().nodename, "since": "then"}
    (run / ".lock").write_text(json.dumps({**owner, "pid": 1 << 22}))
    assert read_status(run)["state"] == "dead"
    (run / ".lock").write_text(json.dumps({"host": "another", "since": "then", "pid": 5}))
    assert read_status(run)["state"] == "running"
    os.utime(run / ".lock", (0, time.time() - 40))
    assert read_status(run)["state"] == "dead"


def test_restarts_and_why(run):
    _cut(run, 8)
    record_event(run, "lost", {"why": "rank 3 (n2) fell silent", "ranks": [3]})
    record_event(run, "restart", {"code": 86, "why": "a rank was lost"})
    record_event(run, "start", {"world_size": 4, "nodes": 2, "job": "5"})
    record_event(run, "requeue", {"code": 85, "why": "preempted"})
    record_event(run, "start", {"world_size": 4, "nodes": 2, "job": "5"})
    record_event(run, "end", {"step": 8, "how": "failed", "why": "TrainingError: no numbers"})
    facts = read_status(run)
    assert (facts["state"], facts["restarts"]) == ("failed", 2)
    assert [why["why"] for why in facts["whys"]] == ["a rank was lost", "preempted"]
    text = describe(facts)
    assert "restarts    2: a rank was lost; preempted" in text
    assert "lost        rank 3 (n2) fell silent" in text
    assert "error       TrainingError: no numbers" in text


def test_the_last_error_of_a_run_that_died_without_a_word(run):
    _cut(run, 8)
    (run / "log" / "slurm-9.out").write_text(
        "step 8/12\nnsphere: x/x-0.tar: no such shard\nsrun: Terminating\n"
    )
    facts = read_status(run)
    assert facts["state"] == "dead"
    assert facts["error"] == "slurm-9.out: nsphere: x/x-0.tar: no such shard"


def test_only_the_last_of_the_metrics_is_read(run):
    lines = (run / "metrics.jsonl").read_text()
    with (run / "metrics.jsonl").open("w") as file:
        for step in range(200_000):
            file.write(json.dumps({"step": step, "loss": 1.0, "filler": "x" * 40}) + "\n")
        file.write(lines + '{"step": 13, "lo')
    assert (run / "metrics.jsonl").stat().st_size > 10 * TAIL_BYTES
    start = time.perf_counter()
    assert read_status(run)["step"] == 12
    assert time.perf_counter() - start < 1.0


def test_runs_are_found_in_a_folder_of_runs(run, tmp_path):
    second = run.parent / "two"
    second.mkdir()
    record_event(second, "submit", {"job": "8_1"})
    assert find_runs([run.parent]) == [run, second] and find_runs([run]) == [run]
    assert read_status(second)["state"] == "new"
    with pytest.raises(ConfigError, match="nowhere: no run: "):
        find_runs([tmp_path / "nowhere"])


def test_the_command_prints_lines_or_json_and_needs_no_torch(run, monkeypatch, capfd):
    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["nsphere", "status", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        return (ended.value.code or 0, *capfd.readouterr())

    code, out, _ = call(str(run), str(run))
    assert code == 0 and out.count(f"{run}: done") == 2
    (facts,) = json.loads(call("--json", str(run))[1])
    assert facts["run"] == str(run)
    code, _, err = call("nowhere")
    assert code == BAD_INPUT and "nsphere: nowhere: no run" in err
    text = "import launch.status, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", text], check=True)


def _cut(run: Path, step: int) -> None:
    """The run as it was after `step`, before anybody told how it ended."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in lines if json.loads(line)["step"] <= step))
    path = run / "events.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in lines if json.loads(line)["event"] == "start"))
