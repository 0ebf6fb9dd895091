"""Two hosts (network namespaces, tests/two_hosts.sh); the cable between them is pulled in a step.

As root, with ip and unshare; elsewhere the tests are skipped and say why.
"""

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from launched import NSPHERE, TORCHRUN, Launched, write_project
from ranks import run_ranks
from tiny_runs import read_losses, read_samples, train_rank

from trainer.config import load_config

pytestmark = [pytest.mark.netns, pytest.mark.slow]
SCRIPT = Path(__file__).with_name("two_hosts.sh")
Switch = Callable[..., None]


@pytest.fixture(scope="module")
def hosts() -> Iterator[Switch]:
    """Two hosts; called with cut, mend."""
    if os.geteuid() != 0:
        pytest.skip("network namespaces need root")
    for name in ("ip", "unshare"):
        if shutil.which(name) is None:
            pytest.skip(f"network namespaces need {name!r} (iproute2, util-linux)")
    os.environ["TWO_HOSTS"] = f"t{os.getpid()}"

    def switch(word: str) -> None:
        subprocess.run([SCRIPT, word], check=True, capture_output=True, text=True)

    try:
        switch("up")
    except subprocess.CalledProcessError as error:
        switch("down")
        pytest.skip(f"no network namespaces here: {error.stderr.strip()}")
    yield switch
    switch("down")
    del os.environ["TWO_HOSTS"]


@pytest.fixture(scope="module")
def project(hosts, tmp_path_factory) -> Path:
    """A run's folder, with a run on two ranks of one host in `whole`."""
    folder = write_project(tmp_path_factory.mktemp("hosts"))
    before = Path.cwd()
    os.chdir(folder)
    try:
        run_ranks(2, train_rank, load_config(folder / "run.toml"), str(folder / "whole"))
    finally:
        os.chdir(before)
    return folder


def on(host: str, project: Path, run: str, *command: str) -> Launched:
    """A launcher on one of the hosts."""
    return Launched(project, run, str(SCRIPT), "on", host, *command)


def cut_in_a_step(hosts: Switch, pair: tuple[Launched, Launched]) -> None:
    """Pull the cable, see the loss noticed on both hosts within the timeout, plug it in again."""
    one, _ = pair
    one.wait_for_step(12)
    hosts("cut")
    cut = time.time()
    try:
        lost = one.wait_for_event("lost")
        assert lost["time"] - cut < 5 + 6  # launch.timeout, and a busy machine's delay
        assert "is the network between the hosts down?" in lost["why"]
        assert len(lost["ranks"]) == 1 and lost["nodes"][0] in ("host-a", "host-b")
        assert lost["nodes"] != [lost["host"]]
        logs = [one.run / "log" / f"rank-{rank:04d}.log" for rank in (0, 1)]
        one.wait_for(lambda: all("stacks of all threads" in log.read_text() for log in logs))
        time.sleep(2.0)
    finally:
        hosts("mend")


def check_same(project: Path, run: Path) -> None:
    assert read_losses(run) == read_losses(project / "whole")
    assert read_samples(run) == read_samples(project / "whole")


def test_a_cable_pulled_under_nsphere(hosts, project):
    command = (
        *(*NSPHERE, "train", "run.toml", "--run", "pulled", "--nproc", "1"),
        *("--nnodes", "2", "--rdzv-endpoint", "host-a"),
    )
    pair = on("a", project, "pulled", *command), on("b", project, "pulled", *command)
    try:
        cut_in_a_step(hosts, pair)
        for launched in pair:
            launched.end(0)
    finally:
        for launched in pair:
            launched.close()
    starts = pair[0].events("start")
    assert [start["nodes"] for start in starts] == [2, 2]
    assert starts[1]["from_step"] in (10, 15)
    check_same(project, pair[0].run)


def test_a_cable_pulled_under_torchrun(hosts, project):
    """Plain torchrun, nothing set but where the agents meet and who they are."""
    pair = []
    for host, address in (("a", "10.77.5.1"), ("b", "10.77.5.2")):
        agent = (
            *("--nnodes=2", "--nproc-per-node=1", "--max-restarts=3", "--rdzv-backend=c10d"),
            *("--rdzv-endpoint=10.77.5.1:29500", "--rdzv-id=two", f"--local-addr={address}"),
        )
        rank = ("-m", "launch.cli", "train", "run.toml", "--run-dir", "torchrun")
        pair.append(on(host, project, "torchrun", *TORCHRUN, *agent, *rank))
    try:
        cut_in_a_step(hosts, (pair[0], pair[1]))
        for launched in pair:
            launched.end(0)
    finally:
        for launched in pair:
            launched.close()
    check_same(project, pair[0].run)
