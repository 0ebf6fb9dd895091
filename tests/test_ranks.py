"""Where a rank stands by its environment, and what is said of environments that contradict."""

import os
import socket
import subprocess
import sys

import pytest

from launch.agent import _open_rendezvous
from launch.hosts import Hosts
from launch.ranks import LaunchError, Place, _open_store, find_place, slurm_master

STEP = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "SLURM_STEP_ID": "0"}
TASK = {**STEP, "SLURM_PROCID": "2", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "0"}
TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}


def test_places_of_every_launcher():
    place = find_place({})
    assert (place.rank, place.world_size, place.source) == (0, 1, "plain")
    place = find_place(TORCHRUN)
    assert (place.rank, place.world_size, place.local_rank, place.source) == (3, 4, 1, "torchrun")
    place = find_place(TASK)
    assert (place.rank, place.world_size, place.local_rank, place.source) == (2, 4, 0, "slurm")
    # srun has started a torchrun on each node, and this is one of torchrun's
    agents = {**TASK, "SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"}
    assert find_place({**agents, **TORCHRUN, "TORCHELASTIC_RUN_ID": "x"}).source == "torchrun"
    # variables made from SLURM's own, as many scripts do
    same = {"RANK": "2", "WORLD_SIZE": "4", "LOCAL_RANK": "0"}
    assert find_place({**TASK, **same}).rank == 2
    # one task of a step that asked for one
    alone = {**STEP, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}
    assert find_place(alone).source == "plain"


CONTRADICTIONS = {
    "a shell of salloc": ({"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2"}, "srun python -P"),
    "salloc's step": ({**STEP, "SLURM_STEP_ID": "4294967290"}, "shell of SLURM job 7 with 2 nodes"),
    "two sources": (
        {**TASK, "RANK": "0", "WORLD_SIZE": "8", "LOCAL_RANK": "0"},
        "RANK=0, WORLD_SIZE=8 contradict srun, which started this as task 2 of 4",
    ),
    "rank": ({**TORCHRUN, "RANK": "4"}, "RANK=4 with WORLD_SIZE=4: ranks count from 0 to 3"),
    "local rank": ({**TORCHRUN, "LOCAL_RANK": "2"}, "LOCAL_RANK=2 with 2 ranks on this node"),
    "half": ({"RANK": "0", "WORLD_SIZE": "2"}, "but not LOCAL_RANK"),
    "no number": ({**TASK, "SLURM_PROCID": "x"}, "but not SLURM_PROCID"),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_a_contradiction_is_one_line(case):
    environment, said = CONTRADICTIONS[case]
    with pytest.raises(LaunchError) as refused:
        find_place(environment)
    assert said in str(refused.value) and "\n" not in str(refused.value)


def test_another_step_has_another_port():
    here = {"MASTER_ADDR": "h", "SLURM_JOB_ID": "7"}
    ports = {
        slurm_master({**here, "SLURM_STEP_ID": str(step), "SLURM_RESTART_COUNT": str(again)})[1]
        for step in range(4)
        for again in range(4)
    }
    assert len(ports) == 16 and all(20000 <= port < 32768 for port in ports)


MEET = """
import os, sys
from launch.ranks import LaunchError, open_ranks
try:
    with open_ranks(os.environ, meeting_s=30) as ranks:
        print(ranks.rank, "of", ranks.world_size)
except LaunchError as error:
    sys.exit(f"refused: {error}")
"""


def start(rank: int, **variables: str) -> subprocess.Popen:
    """A process that somebody has made a rank by hand."""
    environment = {
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "PYTHONPATH": os.getcwd(),
        **variables,
    }
    return subprocess.Popen(
        [sys.executable, "-c", MEET],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def refusal(**variables: str) -> str:
    rank = start(0, **variables)
    said = [line for line in rank.communicate(timeout=100)[1].splitlines() if "refused" in line]
    assert rank.returncode == 1 and len(said) == 1
    return said[0]


def test_ranks_made_by_hand_meet_on_the_address_given_alone():
    port = free_port()
    first = start(0, MASTER_PORT=port, LOCAL_WORLD_SIZE="2")
    while not (bound := _listeners(int(port))):
        assert first.poll() is None, first.communicate()
    assert bound == {"127.0.0.1"}, "the store listens on every interface"
    second = start(1, MASTER_PORT=port, LOCAL_WORLD_SIZE="2")
    for rank, process in enumerate((first, second)):
        out, err = process.communicate(timeout=100)
        assert out == f"{rank} of 2\n", err


def _listeners(port: int) -> set[str]:
    """Addresses that something listens on at `port`."""
    found = subprocess.run(["ss", "-ltnH"], capture_output=True, text=True).stdout
    places = [line.split()[3].rpartition(":") for line in found.splitlines()]
    return {address for address, _, where in places if where == str(port)}


def test_a_port_that_is_taken_and_an_address_that_is_none():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert f"MASTER_PORT={port} is taken" in refusal(MASTER_PORT=port)
    nowhere = refusal(MASTER_PORT=port, MASTER_ADDR="nowhere.invalid")
    assert "MASTER_ADDR=nowhere.invalid cannot be found" in nowhere
    assert "MASTER_ADDR ('') or MASTER_PORT" in refusal(MASTER_PORT=port, MASTER_ADDR="")


@pytest.mark.parametrize("port", ["70000", "0", "2²", "http"])
def test_a_port_that_is_none(port):
    here = {"MASTER_ADDR": "localhost", "MASTER_PORT": port}
    with pytest.raises(LaunchError, match=f"^MASTER_PORT={port} is no port: set it to a free one"):
        _open_store(Place(0, 2, 0, "torchrun"), here, 1.0)
    with pytest.raises(LaunchError, match=f"^MASTER_PORT={port} is no port"):
        slurm_master(here)


def test_a_program_that_listens_and_is_no_store_is_not_waited_for_without_end(monkeypatch):
    """torch's client waits for its greeting whatever the time limit."""
    monkeypatch.setattr("launch.ranks.ANSWER_S", 0.5)
    monkeypatch.setattr("launch.agent.ANSWER_S", 0.5)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        here = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        with pytest.raises(LaunchError, match=f"MASTER_PORT={port}: what listens there is not"):
            _open_store(Place(1, 2, 1, "torchrun"), here, 0.5)
        hosts = Hosts(2, 2, f"127.0.0.1:{port}", "run", 30.0)
        with pytest.raises(LaunchError, match=f":{port} cannot be reached, or its port is taken"):
            _open_rendezvous(hosts)


def test_every_rank_says_what_is_wrong_with_its_own_environment():
    words = [sys.executable, "-P", "-m", "launch.cli", "train", "configs/smoke.toml"]
    given = {"RANK": "3", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}
    done = subprocess.run(words, env={**os.environ, **given}, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("nsphere, rank 3: RANK=3 with WORLD_SIZE=2: ranks count from 0")
