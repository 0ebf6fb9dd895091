"""The doctor's page on real ranks, and every fault it must find."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from ranks import run_ranks
from tiny_runs import tiny_config

from launch.doctor import examine
from launch.doctor.disk import measure_disk, read_ends
from launch.doctor.facts import Facts, code_digest, jit_locks, name_problem, port_problem
from launch.doctor.judge import (
    Line,
    Needs,
    judge_clocks,
    judge_data,
    judge_disk,
    judge_links,
    judge_places,
    judge_same,
    page,
)
from launch.doctor.links import clock_skew, network_speed
from trainer.config import dump_config, load_config
from trainer.lock import RunLock
from trainer.ranks import Ranks
from trainer.samples import build_samples

ROOT = Path(__file__).parents[1]


def _examine(group, path: str, run: str, fault: str) -> list[Line]:
    """As a rank; rank 1 is at fault."""
    ranks = Ranks(group, group.rank(), group.size(), group.rank())
    os.environ["OMP_NUM_THREADS"] = "1"
    overrides = []
    if group.rank() == 1:
        if fault == "config":
            overrides = ["--optim.lr=0.5"]
        elif fault == "bad config":
            overrides = ["--optim.lrr=0.5"]
        elif fault == "shard":
            overrides = ["--data.shards=" + str(Path(path).parent / "copy" / "x-{0..2}.tar")]
        elif fault == "limits":
            import resource

            resource.setrlimit(resource.RLIMIT_NOFILE, (512, 4096))
    return examine(lambda: load_config(path, overrides), Path(run), ranks)


@pytest.fixture
def project(tmp_path) -> Path:
    """A folder with an indexed data set and run.toml."""
    config = tiny_config(tmp_path)
    build_samples(config)
    (tmp_path / "run.toml").write_text(dump_config(config))
    return tmp_path


def _lines(project: Path, fault: str = "") -> dict[str, Line]:
    found = run_ranks(2, _examine, str(project / "run.toml"), str(project / "run"), fault)
    assert found[0] == found[1], "every rank knows the verdict"
    return {line.name: line for line in found[0]}


def test_two_ranks_are_well(project):
    lines = _lines(project)
    bad = {name for name, line in lines.items() if not line.ok}
    assert not bad - {"threads", "open files"}, page(list(lines.values()))
    assert "3 read at both ends by every rank" in lines["shards"].found
    assert "the same on all 2 rank(s)" in lines["index"].found
    assert "GB/s" in lines["all-reduce"].found and "GiB free" in lines["run folder"].found
    assert not list(project.glob(".nsphere-doctor-*")), "the probe of the disk is removed"


def test_faults_of_one_rank_are_named(project):
    found = _lines(project, "config")["configuration"]
    assert not found.ok and "on rank 0" in found.found and "on rank 1" in found.found
    assert "the same file and the same overrides" in found.todo
    found = _lines(project, "bad config")["configuration"]
    assert not found.ok and "rank 1: " in found.found and "unknown key optim.lrr" in found.found
    found = _lines(project, "limits")["open files"]
    assert not found.ok and "rank 1" in found.found and "ulimit -n" in found.todo


def test_a_shard_that_one_rank_cannot_read_or_has_otherwise(project):
    shutil.copytree(project / "shards", project / "copy")
    (project / "copy" / "x-1.tar").unlink()
    found = _lines(project, "shard")["shards"]
    assert not found.ok and "x-1.tar" in found.found and "rank 1" in found.found
    config = load_config(project / "run.toml")
    here = _facts(shards=read_ends(config))
    (project / "shards" / "x-2.tar").write_bytes(b"other" * 1000)
    (line,) = judge_data([here, _facts(rank=1, shards=read_ends(config))])
    assert "x-2.tar is not the same file everywhere" in line.found


def test_indexes_of_different_data_differ(project):
    one, other = _facts(fingerprint="a" * 32), _facts(rank=1, fingerprint="b" * 32)
    (line,) = judge_data([one, other])
    assert not line.ok and "aaaaaaaaaaaa on rank 0" in line.found


def _facts(**known) -> Facts:
    blank = Facts(
        rank=0, host="n1", versions={"torch": "2.11"}, gpus=[], gpu_problem="", topology="",
        code="c", config="", config_problem="", shared_free=2**30, shared_total=2**30,
        open_files=65536, locked_memory=-1, threads=1, cores=2, name_problem="", port_problem="",
        jit_locks=[],
    )  # fmt: skip
    return replace(blank, **known)


def _named(lines: list[Line], name: str) -> Line:
    (found,) = (line for line in lines if line.name == name)
    return found


def test_what_differs_between_nodes():
    old = _facts(rank=1, host="n2", versions={"torch": "2.10"}, code="d")
    versions, code = judge_same([_facts(), old])
    assert not versions.ok and "2.10 on rank 1" in versions.found
    assert not code.ok and "the same checkout" in code.todo


def test_what_one_node_lacks():
    full = _facts(rank=1, host="n2", shared_free=2**20, threads=8, name_problem="n9 (unknown)")
    lines = judge_places([_facts(), full], Needs(shared_bytes=2**28))
    assert "--shm-size" in _named(lines, "/dev/shm").todo
    assert "OMP_NUM_THREADS=2" in _named(lines, "threads").todo
    assert "rank 1 on n2: n9 (unknown)" in _named(lines, "host names").found
    gpus = ["H100 80 GiB"] * 8
    lines = judge_places([_facts(gpus=gpus), _facts(rank=1, host="n2", gpus=gpus[:7])], Needs())
    assert not _named(lines, "GPUs").ok
    lines = judge_places([_facts(gpus=gpus, locked_memory=65536)], Needs())
    assert "ulimit -l unlimited" in _named(lines, "locked memory").todo
    lines = judge_places([_facts(gpu_problem="torch sees none")], Needs())
    assert "torch sees none" in _named(lines, "GPUs").found


def test_clocks_that_are_apart():
    assert clock_skew([[5.0, 5.2], [6.0, 6.01]]) == pytest.approx(0.01)
    line = judge_clocks(clock_skew([[5.0, 65.0], [6.0, 66.5]]))
    assert not line.ok and "60.000 s" in line.found and "chrony" in line.todo
    assert judge_clocks(0.1).ok


def test_a_slow_link_between_hosts(tmp_path):
    (tmp_path / "eth0").mkdir()
    (tmp_path / "eth0" / "speed").write_text("100000\n")  # Mbit/s
    link = network_speed(tmp_path)
    assert link == 12.5e9
    measured = [{"bytes": 2.0**20, "seconds": 1.0, "rate": 1e9}]
    there = [_facts(), _facts(rank=1, host="n2")]
    (line,) = judge_links(measured, link=link, ranks=there)
    assert not line.ok and "NCCL_SOCKET_IFNAME" in line.todo and "12.5 GB/s" in line.found
    (line,) = judge_links(measured, link=link, ranks=[_facts(), _facts(rank=1)])
    assert line.ok, "between ranks of one host the network says nothing"


def test_a_stale_lock_of_a_compiler(tmp_path):
    lock = tmp_path / "cpu_adam" / "lock"
    lock.parent.mkdir()
    lock.touch()
    environment = {"TORCH_EXTENSIONS_DIR": str(tmp_path)}
    assert jit_locks(environment) == [], "a build that has just begun"
    os.utime(lock, (time.time() - 3600,) * 2)
    assert jit_locks(environment) == [str(lock)]
    line = _named(judge_places([_facts(jit_locks=[str(lock)])], Needs()), "compiler locks")
    assert not line.ok and "rm it" in line.todo


def test_a_port_that_is_taken_and_a_name_that_is_none():
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert port in port_problem({"MASTER_PORT": port})
        assert not port_problem({"MASTER_PORT": port, "RANK": "0"}), "its own rendezvous"
    assert "no number" in port_problem({"MASTER_PORT": "auto"})
    assert "nowhere.invalid" in name_problem({"MASTER_ADDR": "nowhere.invalid"})


def test_a_run_folder_in_use_or_not_writable(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    lock = RunLock(run / ".lock")
    facts, problem = measure_disk(run)
    assert "is in use by process" in problem and facts["write"] > 0
    (line,) = judge_disk(_facts(disk=facts, disk_problem=problem), Needs())
    assert not line.ok and "another --run" in line.todo
    lock.close()
    assert measure_disk(run)[1] == ""


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a file system, as root only")
def test_a_disk_that_is_too_small(project):
    small = project / "small"
    small.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(small)],
        capture_output=True,
        text=True,
    )
    if mounted.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {mounted.stderr.strip()}")
    try:
        done = _command(project, "run.toml", "--run", str(small / "run"), "--json")
    finally:
        subprocess.run(["umount", str(small)], check=True)
    assert done.returncode == 1, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    (line,) = (line for line in found["lines"] if line["name"] == "run folder")
    assert not line["ok"] and "larger disk" in line["todo"]


def _command(folder: Path, *words: str) -> subprocess.CompletedProcess:
    clean = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return subprocess.run(
        [sys.executable, "-P", "-m", "launch.cli", "doctor", *words],
        cwd=folder,
        env={**clean, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )


def test_the_command_on_two_ranks(project):
    done = _command(project, "run.toml", "--nproc", "2", "--run", "r", "--train.ema=0.9")
    assert "the same on all 2 rank(s)" in done.stdout, done.stderr
    assert done.returncode == (0 if "all is well" in done.stdout else 1)


def test_the_code_is_known_by_every_byte(tmp_path):
    for folder in ("launch", "trainer", "data"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.py").write_text("x = 1\n")
    before = code_digest(tmp_path)
    (tmp_path / "data" / "a.py").write_text("x = 2\n")
    assert code_digest(tmp_path) != before and len(code_digest(ROOT)) == 16
