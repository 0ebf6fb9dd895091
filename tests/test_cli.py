"""The command line as a user meets it: real processes, one clear line for bad input, exit codes."""

import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_runs import MODEL, read_losses, read_samples, write_shards

from launch.cli import main
from launch.ranks import LaunchError, find_place, slurm_master
from launch.signals import BAD_INPUT, STOPPED
from trainer.config import load_config
from trainer.run import check_config, open_run

STOP_SIGNALS = [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT]
TOML = """
[data]
shards = "{shards}"
val_shards = "{shards}"
workers = 1
chunk = 4
[model]
name = "model.json"
[optim]
lr = 1e-2
[train]
duration = "40 steps"
global_batch_size = 16
precision = "fp32"
[checkpoint]
every = "5 steps"
[log]
every = "1 steps"
samples = true
trackers = []
"""


@pytest.fixture
def project(tmp_path) -> Path:
    """A folder with shards, a model and run.toml."""
    shards = write_shards(tmp_path / "x")
    (tmp_path / "model.json").write_text(json.dumps(MODEL))
    (tmp_path / "run.toml").write_text(TOML.format(shards=shards))
    return tmp_path


@pytest.fixture
def call(project, monkeypatch, capfd):
    """Calls the command in this process: (exit code, stdout, stderr)."""
    monkeypatch.chdir(project)
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    logger = logging.getLogger("nsphere")
    logs = (logger.propagate, logger.handlers, logger.level)

    def run(*arguments: str) -> tuple[int, str, str]:
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(sys, "argv", ["nsphere", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        return (ended.value.code or 0, *capfd.readouterr())

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)
    logger.propagate, logger.handlers, logger.level = logs


@pytest.fixture
def done(call):
    """Calls the command in this process, expects success; returns its stdout."""

    def run(*arguments: str) -> str:
        code, out, err = call(*arguments)
        assert code == 0, err
        return out

    return run


@pytest.fixture
def refused(call):
    """Calls the command in this process, expects exit 2; returns the one line it said."""

    def run(*arguments: str) -> str:
        code, _, err = call(*arguments)
        said = [line for line in err.splitlines() if line.startswith("nsphere: ")]
        assert code == BAD_INPUT and len(said) == 1, err
        return said[0]

    return run


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-P", "-m", "launch.cli", *arguments]


def environment() -> dict[str, str]:
    clean = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return {**clean, "OMP_NUM_THREADS": "1"}


def nsphere(folder: Path, *arguments: str, code: int = 0) -> subprocess.CompletedProcess:
    done = subprocess.run(
        command(*arguments),
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == code, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def test_sigkill_at_any_step_and_the_same_command_goes_on(project):
    """The README's promise, through the real launcher: bit-identical losses, the same samples."""
    start = ["train", "run.toml", "--nproc", "2"]
    nsphere(project, *start, "--run", "whole")
    running = subprocess.Popen(
        command(*start, "--run", "killed"), cwd=project, env=environment(), start_new_session=True
    )
    step = 5 + os.urandom(1)[0] % 25
    _wait_for(project / "killed" / "samples" / f"step-{step:08d}.json", running)
    os.kill(running.pid, signal.SIGKILL)  # the launcher alone: its ranks must not live on
    running.wait()
    time.sleep(1.0)
    assert not _alive_in_group(running.pid), "ranks outlive their launcher"
    nsphere(project, *start, "--run", "killed")
    assert read_losses(project / "killed") == read_losses(project / "whole")
    assert read_samples(project / "killed") == read_samples(project / "whole")


@pytest.mark.parametrize("number", STOP_SIGNALS[:2])
def test_a_signal_saves_and_stops(project, number):
    start = ["train", "run.toml", "--nproc", "2", "--run", "r", "--checkpoint.every=1000 steps"]
    running = subprocess.Popen(
        command(*start), cwd=project, env=environment(), start_new_session=True
    )
    _wait_for(project / "r" / "samples" / "step-00000003.json", running)
    running.send_signal(number)
    assert running.wait(timeout=100) == STOPPED
    saved = sorted(path.name for path in (project / "r" / "checkpoints").glob("step-*"))
    assert len(saved) == 1 and saved[0] >= "step-00000003"
    assert max(read_losses(project / "r")) == int(saved[0].removeprefix("step-"))


def _wait_for(path: Path, running: subprocess.Popen) -> None:
    deadline = time.monotonic() + 100
    while not path.exists():
        assert running.poll() is None, f"ended with {running.returncode} before {path.name}"
        assert time.monotonic() < deadline, f"{path} did not come"
        time.sleep(0.02)


def _alive_in_group(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    states = subprocess.run(
        ["ps", "-o", "stat=", "-g", str(group)], capture_output=True, text=True
    ).stdout
    return any(not state.startswith("Z") for state in states.split())


def test_train_evaluate_export_report(project, done):
    done("train", "run.toml", "--run", "r", "--train.duration=4 steps", "--nproc", "1")
    found = done("eval", "r", "--task", "retrieval", "--task", "zero_shot")
    results = json.loads(found.splitlines()[-1])
    assert results["num_images"] == 60 and "zero_shot_top1" in results
    done("export", "r", "out", "--format", "open_clip")
    assert (project / "out" / "open_clip_config.json").exists()
    done("export", "r", "out.safetensors", "--format", "safetensors")
    done("report", "r")
    assert "image/svg" in (project / "r" / "report.html").read_text()
    (project / "model.json").unlink()  # a checkpoint stands alone
    two_ranks = nsphere(project, "eval", "r/checkpoints/step-00000004", "--nproc", "2")
    again = json.loads(two_ranks.stdout.splitlines()[-1])
    assert again["image_to_text_R@1"] == results["image_to_text_R@1"]


def test_a_rank_under_torchrun(project):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [
            *(*torchrun, "--nproc-per-node", "2", "-m", "launch.cli"),
            *("train", "run.toml", "--train.duration=2 steps", "--run-dir", "r"),
        ],
        cwd=project,
        env={**environment(), "PYTHONSAFEPATH": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    assert sorted(read_losses(project / "r")) == [1, 2]


BAD = {
    "unknown key": (["--optim.lrr=1"], "unknown key optim.lrr; nearest: optim.lr"),
    "bad value": (["--train.duration=soon"], "'soon' is not a duration"),
    "no override": (["--fast"], "--section.key=value"),
    "missing shard": (["--data.shards=x/x-9.tar"], "x-9.tar"),
    "no shards": (["--data.shards="], "no training data"),
    "batch": (["--train.global_batch_size=61"], "a global batch takes 61 samples"),
    "caption": (["--data.caption_key=json:title"], "json"),
    "ranks": (["--nproc", "17"], "17 ranks for train.global_batch_size = 16"),
    "memory": (["--nproc", "16", "--model.name=EVA02-E-14-plus"], "GiB"),
    "model": (["--model.name=ViT-B-33"], "ViT-B-32"),
    "model file": (["--model.name=nowhere.json"], "nowhere.json"),
    "resume": (["--resume=sometimes"], "choose auto or never"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_clear_line_and_exit_2(project, refused, case):
    arguments, said = BAD[case]
    assert said in refused("train", "run.toml", "--run", "r", *arguments)
    assert not (project / "r").exists()


def test_a_run_folder_of_another_configuration_names_the_keys(project, refused):
    short = ["train", "run.toml", "--run", "r"]
    open_run(project / "r", load_config(project / "run.toml")).close()
    assert "optim.lr: 0.01 -> 0.5" in refused(*short, "--optim.lr=0.5")
    assert "holds a run already" in refused(*short, "--resume=never")
    free = load_config(project / "run.toml", ["--log.every=2 steps", "--data.workers=0"])
    check_config(project / "r", free, resume=True)


def test_an_empty_set_and_other_commands_say_what_is_wrong(project, refused):
    empty = project / "empty.tar"
    empty.write_bytes(b"\0" * 10240)
    for arguments, said in (
        (["train", "run.toml", f"--data.shards={empty}"], "empty.tar"),
        (["eval", "nowhere"], "no such folder"),
        (["export", "x", "out"], "without a whole checkpoint"),
        (["report", "x"], "metrics.jsonl"),
        (["index", "nowhere.tar"], "nowhere.tar"),
        (["pack", "folder", "nowhere", "out"], "no such folder"),
        (["config", "nowhere.toml"], "no such file"),
    ):
        assert said in refused(*arguments)


def test_order_and_config_and_index_print(done):
    report = done("order", "run.toml", "--report")
    assert "distinct shards in a batch of 16" in report
    keys = done("order", "run.toml", "--step", "2").split()
    assert len(keys) == len(set(keys)) == 16
    assert "lr = 0.5" in done("config", "run.toml", "--optim.lr=0.5")
    assert "60 samples" in done("index", "x/x-{0..2}.tar")


def test_places_of_every_launcher():
    assert find_place({}).world_size == 1
    torchrun = find_place({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"})
    assert (torchrun.rank, torchrun.world_size, torchrun.local_rank) == (3, 4, 1)
    step = {"SLURM_PROCID": "2", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "0"}
    assert find_place(step).source == "slurm" and find_place(step).rank == 2
    assert find_place({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}).source == "plain"  # batch shell
    with pytest.raises(LaunchError, match="not LOCAL_RANK"):
        find_place({"RANK": "0", "WORLD_SIZE": "2"})
    assert slurm_master({"MASTER_ADDR": "h", "SLURM_JOB_ID": "7"}) == ("h", 20049)
