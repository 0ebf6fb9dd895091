"""Runs whose ranks are killed, stopped, asked to stop: started again as they should be, or not.

Through the real launchers; whatever befell a run, its losses are those of one that nobody touched.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
import torch.distributed as dist
from launched import NSPHERE, TORCHRUN, Launched, kill_leftovers, write_project
from ranks import run_ranks
from tiny_runs import read_losses, read_samples, train_rank

from launch.hosts import Hosts
from launch.jit_locks import remove_stale_locks
from launch.meeting import meet
from launch.restarts import Restarts, explain, verdict
from launch.signals import BAD_INPUT, OWN_ERROR, RANK_LOST, STOPPED, dies_of_usr1
from trainer.config import ConfigError, load_config
from trainer.events import read_events
from trainer.lock import Owner, RunLock

Start = Callable[..., Launched]
TWO_RANKS = [*NSPHERE, "train", "run.toml", "--nproc", "2"]
TORCHRUN_TWO = [*TORCHRUN, "--nproc-per-node", "2", "--max-restarts", "2"]
AS_RANK = ["-m", "launch.cli", "train", "run.toml"]


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """A run's folder, with a run on two ranks in `whole` that nobody touched."""
    folder = write_project(tmp_path_factory.mktemp("elastic"))
    before = Path.cwd()
    os.chdir(folder)
    try:
        run_ranks(2, train_rank, load_config(folder / "run.toml"), str(folder / "whole"))
    finally:
        os.chdir(before)
    return folder


@pytest.fixture
def start(project) -> Iterator[Start]:
    """Starts a command on a run folder of its own; ends it when the test ends."""
    begun: list[Launched] = []

    def begin(run: str, *command: str) -> Launched:
        begun.append(Launched(project, run, *command))
        return begun[-1]

    yield begin
    for launched in begun:
        launched.close()


def check_same(project: Path, run: Path, tolerance: float = 0.0) -> None:
    losses, whole = read_losses(run), read_losses(project / "whole")
    assert losses.keys() == whole.keys()
    assert max(abs(losses[step] - whole[step]) for step in whole) <= tolerance
    assert read_samples(run) == read_samples(project / "whole")


def test_a_killed_rank_is_started_again_by_nsphere(project, start):
    run = start("killed", *TWO_RANKS, "--run", "killed", "--resume=never")
    run.wait_for_step(12)
    run.signal_rank(1, signal.SIGKILL)
    run.end(0)
    check_same(project, run.run)
    assert "rank 1 was killed by SIGKILL (out of memory?); restart 1 of 3 from step" in run.said
    [lost], [again] = run.events("lost"), run.events("restart")
    assert lost["ranks"] == [1] and lost["nodes"] == [os.uname().nodename]
    assert lost["last_collective"]["name"].startswith("gloo:")
    assert (again["code"], again["why"]) == (137, "rank 1 was killed by SIGKILL (out of memory?)")
    first, second = run.events("start")
    assert (first["restart"], first["from_step"], first["world_size"]) == (0, 0, 2)
    assert second["restart"] == 1 and second["from_step"] in (5, 10)
    assert [end["how"] for end in run.events("end")] == ["done"]
    said = [line for line in run.said.splitlines() if "lost rank 1" in line]
    assert len(said) == 1 and said[0].startswith("nsphere, rank 0: lost rank 1 (")
    assert "Traceback" not in run.said
    log = (run.run / "log" / "rank-0000.log").read_text()
    assert "--- last collectives: gloo:" in log and "most recent call first" in log


def test_a_killed_rank_is_started_again_by_plain_torchrun(project, start):
    """Its store keeps the dead ranks' addresses; the living meet beside them."""
    run = start("torchrun", *TORCHRUN_TWO, *AS_RANK, "--run-dir", "torchrun", "--resume=never")
    run.wait_for_step(12)
    run.signal_rank(0, signal.SIGKILL)
    run.end(0)
    check_same(project, run.run)
    assert [event["restart"] for event in run.events("start")] == [0, 1]
    assert "this torchrun dies of SIGUSR1" in run.said


def test_a_silent_rank_is_noticed_named_and_started_again(project, start):
    run = start("silent", *TWO_RANKS, "--run", "silent")
    run.wait_for_step(12)
    run.signal_rank(1, signal.SIGSTOP)
    stopped = time.time()
    lost = run.wait_for_event("lost")
    assert lost["time"] - stopped < 5 + 4
    assert lost["ranks"] == [1] and lost["why"] == "no sign of life for 5 s"
    run.end(0)
    check_same(project, run.run)
    log = (run.run / "log" / "rank-0000.log").read_text()
    assert "leaving: no sign of life for 5 s" in log and "trainer/step.py" in log
    assert "left because a peer was lost (exit code 86); restart 1 of 3" in run.said


def test_restarts_without_progress_end(start):
    run = start(
        "hopeless",
        *(*TWO_RANKS, "--run", "hopeless"),
        *("--launch.max_restarts=1", "--checkpoint.every=1000 steps"),
    )
    for number in (1, 2):
        run.wait_for_event("start", number)
        run.signal_rank(1, signal.SIGKILL)
        run.wait_for_event("lost", number)
    run.end(137)
    assert "restart 1 of 1 from the start" in run.said
    assert (
        "not restarted: 1 restarts in a row from the start brought no newer checkpoint "
        "(launch.max_restarts = 1)"
    ) in run.said


def test_its_own_error_is_not_started_again(start):
    run = start("wrong", *TWO_RANKS, "--run", "wrong", "--optim.lr=1e30", "--train.max_skipped=0")
    run.end(OWN_ERROR)
    assert "nsphere: step" in run.said and "train.max_skipped = 0" in run.said
    assert not run.events("restart") and not run.events("lost")
    [end] = run.events("end")
    assert end["how"] == "failed" and "TrainingError" in end["why"]


@pytest.mark.parametrize(
    ("run", "command", "number", "code"),
    [
        ("int", [*TWO_RANKS, "--run", "int"], signal.SIGINT, STOPPED),
        ("term", [*TORCHRUN_TWO, *AS_RANK, "--run-dir", "term"], signal.SIGTERM, 1),
    ],
)
def test_a_signal_to_the_launcher_saves_and_stops(start, run, command, number, code):
    launched = start(run, *command)
    launched.wait_for_step(7)
    ranks = list(launched.ranks().values())
    launched.signal(number)
    launched.end(code)
    assert not kill_leftovers(ranks)
    [end] = launched.events("end")
    assert end["how"] == "stopped"
    assert (launched.run / "checkpoints" / f"step-{end['step']:08d}" / "manifest.json").exists()
    assert (launched.run / ".stopped").exists()
    assert launched.said.count("saving and stopping after this step") == 1


def test_a_signal_while_python_starts_in_the_ranks_is_no_failure(start):
    run = start("early", *TWO_RANKS, "--run", "early")
    run.wait_for(lambda: len(run.ranks()) == 2)
    run.signal(signal.SIGUSR1)
    run.end(STOPPED)
    assert "SIGUSR1: stopped before the first step" in run.said
    assert "failed" not in run.said and "killed" not in run.said


def test_a_second_signal_leaves_at_once_though_a_rank_is_stopped(start):
    run = start("twice", *TWO_RANKS, "--run", "twice", "--launch.timeout=100")
    run.wait_for_step(7)
    ranks = run.ranks()
    os.kill(ranks[1], signal.SIGSTOP)
    time.sleep(0.5)
    run.signal(signal.SIGTERM)
    time.sleep(1.5)
    run.signal(signal.SIGTERM)
    begun = time.monotonic()
    run.end(143)
    assert time.monotonic() - begun < 10
    assert not kill_leftovers(list(ranks.values()))
    assert "SIGTERM again: leaving at once" in run.said


def test_a_launcher_that_is_killed_leaves_no_process(start):
    """Neither ranks nor their workers, which would hold the run's folder."""
    run = start("orphans", *TWO_RANKS, "--run", "orphans")
    run.wait_for_step(3)
    ranks = run.ranks()
    workers = [pid for rank in ranks.values() for pid in children_of(rank)]
    assert len(ranks) == 2 and len(workers) >= 2
    run.signal(signal.SIGKILL)
    assert not kill_leftovers([*ranks.values(), *workers])


def children_of(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for task in tasks for child in task.read_text().split()]


@pytest.mark.slow
def test_more_and_fewer_hosts_go_on(project, start):
    """Two launchers with --nnodes 1:2: one begins alone, takes the other in, goes on without it."""
    with socket.create_server(("localhost", 0)) as probe:
        port = probe.getsockname()[1]
    hosts = ("--nnodes", "1:2", "--nproc", "1", "--rdzv-endpoint", f"localhost:{port}")
    command = (*NSPHERE, "train", "run.toml", *hosts, "--run", "hosts")
    one = start("hosts", *command)
    one.wait_for_step(4)
    one.signal_rank(0, signal.SIGSTOP)  # or it would be done before the other has begun
    other = start("hosts", *command)
    one.wait_for(lambda: "another host starts its ranks again, or joins" in one.said)
    one.signal_rank(0, signal.SIGCONT)
    both = one.wait_for_event("start", 2)
    one.wait_for_step(both["from_step"] + 3)
    other.signal(signal.SIGKILL)
    one.end(0)
    assert [event["world_size"] for event in one.events("start")] == [1, 2, 1]
    assert both["from_step"] >= 4  # it saved before it took the other in
    check_same(project, one.run, 1e-4)


SLEEPING = """
import os, sys, time
from launch.signals import StopRequest
stop = StopRequest()
stop.install()
print("ready", flush=True)
for _ in range(int(sys.argv[1])):
    stop()
time.sleep(30)
"""


@pytest.mark.parametrize(
    ("asked", "signals", "code"),
    [(0, 1, STOPPED), (1, 2, 128 + signal.SIGUSR1)],
)
def test_signals_while_a_rank_is_blocked(asked, signals, code):
    """Before the first step there is nothing to save; later the second one leaves at once."""
    with subprocess.Popen(
        [sys.executable, "-c", SLEEPING, str(asked)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        for _ in range(signals):
            process.send_signal(signal.SIGUSR1)
            process.send_signal(signal.SIGTERM)  # so soon it is the same request
            time.sleep(1.2)
        assert process.wait(10) in (code, 128 + signal.SIGTERM)


def test_handlers_stand_before_torch_is_imported():
    code = "import sys, launch.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-P", "-c", code], check=False).returncode == 0


def test_who_dies_of_usr1():
    assert not dies_of_usr1(os.getpid()) or signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL
    with subprocess.Popen(["sleep", "30"]) as process:
        assert dies_of_usr1(process.pid)
        process.kill()
    assert not dies_of_usr1(process.pid)


def test_stale_locks_of_compilers_are_removed(tmp_path, capsys):
    old, fresh = tmp_path / "cpu_adam" / "lock", tmp_path / "py311_cu130" / "fused_adam" / "lock"
    for lock in (old, fresh):
        lock.parent.mkdir(parents=True)
        lock.touch()
    os.utime(old, (0, 0))
    (old.parent / "cpu_adam.o").touch()
    os.utime(old.parent / "cpu_adam.o", (0, 0))
    remove_stale_locks({"TORCH_EXTENSIONS_DIR": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path)})
    assert not old.exists() and fresh.exists()
    assert f"{old} removed" in capsys.readouterr().err


HOLDING = """
import fcntl, sys, time
file = open(sys.argv[1], "r+")
fcntl.flock(file, fcntl.LOCK_EX)
print("held", flush=True)
time.sleep(float(sys.argv[2]))
"""


@pytest.mark.parametrize(("held_s", "taken"), [(2.0, True), (30.0, False)])
def test_the_lock_of_a_host_that_is_gone_is_waited_for(tmp_path, monkeypatch, held_s, taken):
    """A file server frees it after the lease; until then a restart without that host waits."""
    monkeypatch.setattr("trainer.lock.SILENT_S", 0.5)
    monkeypatch.setattr("trainer.lock.LEASE_S", 4.0)
    path = tmp_path / ".lock"
    path.write_text(json.dumps(asdict(Owner(1, "a-host-that-is-gone", "yesterday"))))
    command = [sys.executable, "-c", HOLDING, str(path), str(held_s)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        if taken:
            RunLock(path).close()
        else:
            with pytest.raises(ConfigError, match="is in use by process 1 on a-host-that-is-gone"):
                RunLock(path)
        process.kill()


@pytest.mark.parametrize(
    ("codes", "job"),
    [
        ([0, 0], 0),
        ([-9, RANK_LOST], 137),
        ([RANK_LOST, OWN_ERROR], OWN_ERROR),
        ([-9, OWN_ERROR], 137),
        ([RANK_LOST, STOPPED], STOPPED),
        ([BAD_INPUT, OWN_ERROR], BAD_INPUT),
        ([RANK_LOST, 0], RANK_LOST),
        ([143, 0], 143),
        ([], 0),
    ],
)
def test_the_jobs_code_from_its_ranks(codes, job):
    assert verdict(codes) == job


def test_restarts_are_counted_without_progress_only(tmp_path, capsys):
    restarts = Restarts(tmp_path, 2)
    lost = {0: RANK_LOST, 1: -9}
    assert restarts.allow(lost) and restarts.allow(lost)
    (tmp_path / "checkpoints" / "step-00000005").mkdir(parents=True)
    assert restarts.allow(lost) and restarts.allow(lost) and not restarts.allow(lost)
    assert not Restarts(tmp_path, 2).allow({0: STOPPED})
    assert len(read_events(tmp_path)) == 4
    assert "restart 2 of 2 from step 5" in capsys.readouterr().err
    assert explain({0: 86, 1: 86, 2: -11, 3: 7}) == (
        "rank 2 was killed by SIGSEGV; rank 3 ended with exit code 7; "
        "rank 0, 1 left because a peer was lost (exit code 86)"
    )


def test_hosts_from_the_command_line():
    both = Hosts.parse("2:4", "localhost", "r", 10)
    assert (both.minimum, both.maximum, both.endpoint) == (2, 4, "localhost:29400")
    assert both.is_here and both.own_address == "127.0.0.1" and both.interface() == "lo"
    assert Hosts.parse("1", "", "r", 10).is_alone
    for hosts, endpoint, said in (
        ("4:2", "a:1", "MIN is more than MAX"),
        ("two", "a:1", "give a number of hosts"),
        ("2", "", "needs --rdzv-endpoint HOST:PORT"),
        ("2", "a:port", "needs --rdzv-endpoint HOST:PORT"),
        ("2", "a:99999", "needs --rdzv-endpoint HOST:PORT"),
        ("2", "nowhere.invalid:1", "nowhere.invalid is not known here"),
    ):
        with pytest.raises(ValueError, match=said):
            Hosts.parse(hosts, endpoint, "r", 10)


def test_the_living_meet_where_the_dead_have_been():
    store = dist.TCPStore("localhost", 0, is_master=True)
    names = []
    for _ in range(3):
        names.append(meet_all(store, 3))
        store.set("nsphere/hello/1", "of a rank that died before it was answered")
        with pytest.raises(RuntimeError, match="did not come: connection timed out"):
            meet(store, 0, 3, timeout_s=0.3)
    assert len(set(names)) == 3


def meet_all(store: dist.Store, world_size: int) -> bytes:
    """What rank 0 tells the others in the place where they have met."""
    heard: list[bytes] = [b""] * world_size

    def be(rank: int) -> None:
        client = dist.TCPStore("localhost", store.port, is_master=False)
        place = meet(client, rank, world_size, timeout_s=60)
        if rank == 0:
            place.set("word", os.urandom(4).hex())
        heard[rank] = place.get("word")

    threads = [threading.Thread(target=be, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
        time.sleep(0.05)
    for thread in threads:
        thread.join()
    assert heard[0] and len(set(heard)) == 1
    return heard[0]
