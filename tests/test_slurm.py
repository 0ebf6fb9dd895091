"""A real SLURM on this machine: jobs that are preempted, run out of time, fail and lose ranks.

All cases run at once, each in a thread that plays its story; a test waits for its case and judges.
A run is held at a step until SLURM has asked it to stop (`Gate`): it lasts as long as it must,
costs no time of the processor meanwhile, and cannot end too early.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
from ranks import run_ranks
from tiny_runs import MODEL, read_losses, read_samples, train_rank, write_shards

from launch.job import ask_slurm, parse_time
from launch.status import read_status
from trainer.config import load_config
from trainer.events import read_events

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.timeout(1500)]

SCRIPT = Path(__file__).parent / "slurm_cluster.sh"
PATIENCE_S = 900  # of a story on a busy machine; a quiet one needs a tenth
STEPS = 24
TOML = f"""
[data]
shards = "SHARDS"
workers = 0
chunk = 4
[model]
name = "model.json"
[optim]
lr = 1e-2
[train]
duration = "{STEPS} steps"
global_batch_size = 16
precision = "fp32"
[checkpoint]
every = "10 steps"
[launch]
max_restarts = 9
[log]
every = "1 steps"
samples = true
trackers = []
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """SLURM in this process's environment: n1 and n2 for what is preempted, n3 and n4 beside."""
    if os.geteuid() != 0:
        pytest.skip("a SLURM of our own needs root: munged, slurmctld and slurmd run as daemons")
    installed = subprocess.run(["bash", SCRIPT, "install"], capture_output=True, text=True)
    if installed.returncode:
        pytest.skip(f"slurm-wlm and munge cannot be installed: {installed.stderr.strip()[-300:]}")
    folder = Path(tempfile.mkdtemp(prefix="nsphere-slurm-", dir="/tmp"))
    before = {name: value for name, value in os.environ.items() if name.startswith("SLURM_")}
    for name in before:
        del os.environ[name]
    try:
        started = subprocess.run(
            ["bash", SCRIPT, "start", folder, "4", "8"], capture_output=True, text=True
        )
        assert started.returncode == 0, started.stderr
        os.environ["SLURM_CONF"] = str(folder / "slurm.conf")
        yield
    finally:
        subprocess.run(["bash", SCRIPT, "stop", folder], check=False)
        subprocess.run(["rm", "-rf", folder], check=False)
        os.environ.pop("SLURM_CONF", None)
        os.environ.update(before)


class Gate:
    """Holds a run at a step: where rank 0 would write the step's sample ids there is a FIFO."""

    def __init__(self, run: Path, step: int) -> None:
        self.step = step
        self._path = run / "samples" / f"step-{step:08d}.part"
        self._path.parent.mkdir(parents=True, exist_ok=True)
        os.mkfifo(self._path)

    def open(self) -> None:
        """Let the run go on, once it is there, and put in place what it has written."""
        text = self._path.read_text()
        final = self._path.with_suffix(".json")
        while not final.exists():
            time.sleep(0.01)
        self._path.write_text(text)
        self._path.replace(final)


@dataclass
class Job:
    """A submitted run."""

    id: str
    run: Path

    def facts(self) -> dict[str, str]:
        """What SLURM says of it."""
        return ask_slurm(self.id)

    def log(self) -> str:
        """All that the job has written."""
        return "".join(path.read_text() for path in sorted((self.run / "log").glob("slurm-*.out")))

    def events(self, name: str) -> list[dict]:
        """Its events of one name."""
        return [event for event in read_events(self.run) if event["event"] == name]

    def wait_for(self, gate: Gate) -> None:
        """Until the run is at the gate, or does the step before it."""
        path = self.run / "samples" / f"step-{gate.step - 1:08d}.json"
        self._wait(path.exists, f"step {gate.step - 1}")

    def wait_until_asked(self, signal_name: str) -> None:
        """Until rank 0 has said that it will stop."""
        said = f"{signal_name}: saving and stopping after this step"
        self._wait(lambda: said in self.log(), said)

    def wait_for_state(self, *states: str) -> str:
        """Until SLURM says one of `states`; a job that waits to be begun again is begun."""
        self._wait(lambda: self._state() in states, " or ".join(states))
        return self._state()

    def ranks(self) -> dict[int, int]:
        """Rank -> process id of those that run."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                words = (folder / "environ").read_bytes().split(b"\0")
                program, *arguments = (folder / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            is_rank = b"python" in program and b"launch.cli" in arguments  # and not srun
            if is_rank and f"SLURM_JOB_ID={self.id}".encode() in words:
                rank = next(w for w in words if w.startswith(b"SLURM_PROCID="))
                found[int(rank.partition(b"=")[2])] = int(folder.name)
        return found

    def _state(self) -> str:
        """What SLURM says; a job that only waits for two minutes to be over is begun."""
        facts = self.facts()
        held = facts.get("JobState") == "PENDING" and facts.get("Reason") == "BeginTime"
        # Begun before the last of it is gone, it would end with its own earlier exit code.
        if held and not _is_anything_left(self.id):
            time.sleep(1)
            scontrol("update", f"jobid={self.id}", "StartTime=now")
        return facts.get("JobState", "")

    def _wait(self, holds: Callable[[], bool], what: str) -> None:
        until = time.monotonic() + PATIENCE_S
        while not holds():
            state = self._state()
            ended = state in ("FAILED", "CANCELLED", "COMPLETED", "TIMEOUT")
            if (ended and not holds()) or time.monotonic() > until:
                raise AssertionError(f"{state} without {what}: {self.run.name}\n{self.log()}")
            time.sleep(0.5)


def _is_anything_left(job: str) -> bool:
    """Whether a process of a job, or one that watches over it, is alive."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            watcher = f"slurmstepd: [{job}.".encode() in (folder / "cmdline").read_bytes()
            words = (folder / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if watcher or f"SLURM_JOB_ID={job}".encode() in words:
            return True
    return False


def scontrol(*arguments: str) -> None:
    subprocess.run(["scontrol", *arguments], capture_output=True, check=False)


def nsphere(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-P", "-m", "launch.cli", *arguments],
        cwd=folder,
        env=_clean_environment(),
        capture_output=True,
        text=True,
    )


def _clean_environment() -> dict[str, str]:
    of_a_rank = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    clean = {name: value for name, value in os.environ.items() if name not in of_a_rank}
    return {**clean, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """A folder with shards, a model and run.toml."""
    folder = tmp_path_factory.mktemp("project")
    shards = write_shards(folder / "x")
    (folder / "model.json").write_text(json.dumps(MODEL))
    (folder / "run.toml").write_text(TOML.replace("SHARDS", shards))
    return folder


def submit(project: Path, name: str, *options: str, nodes: int = 2) -> Job:
    """A job of the project's run, on n3 and n4 if nothing else is said."""
    place = () if "--partition" in options else ("--partition", "beside")
    done = nsphere(
        *(project, "submit", "run.toml", "--run", name, "--nodes", str(nodes), *place, *options)
    )
    assert done.returncode == 0, done.stderr
    words = done.stdout.split()
    assert words[0] == "job" and f"scancel {words[1]}" in done.stdout
    assert f"nsphere status {project / name}" in done.stdout
    return Job(words[1], project / name)


def undisturbed(project: Path, num_ranks: int) -> Path:
    """The same run with nothing in its way."""
    run = project / f"undisturbed-{num_ranks}"
    run_ranks(num_ranks, train_rank, load_config(project / "run.toml"), str(run), timeout_s=600)
    return run


def preempted(project: Path) -> tuple[Job, dict, str]:
    """On the low partition; a job of the high one needs its nodes. Also: status while it waited."""
    gate = Gate(project / "preempted", 5)
    low = ("--ranks-per-node", "2", "--partition", "low", "--time", "30")
    job = submit(project, "preempted", *low)
    job.wait_for(gate)
    high = subprocess.run(
        ["sbatch", "--parsable", "-phigh", "-N2", "--exclusive", "-o/dev/null", "--wrap=true"],
        capture_output=True,
        text=True,
    ).stdout.strip()
    job.wait_until_asked("SIGTERM")
    gate.open()
    until = time.monotonic() + PATIENCE_S
    while job.facts().get("Restarts") != "1" or ask_slurm(high).get("JobState") != "COMPLETED":
        assert time.monotonic() < until, f"{job.facts()}\n{ask_slurm(high)}\n{job.log()}"
        time.sleep(0.5)
    return job, read_status(job.run), job.wait_for_state("COMPLETED", "FAILED")


def out_of_time(project: Path, begun: Callable[[], None]) -> tuple[Job, str]:
    """SLURM says that the time is over, 45 s before it is or somewhat earlier."""
    gate = Gate(project / "out-of-time", 5)
    limit = ("--ranks-per-node", "2", "--time", "30", "--signal-before", "45")
    job = submit(project, "out-of-time", *limit)
    job.wait_for(gate)
    begun()
    # Limits are whole minutes, and nobody knows how long a busy machine needs to begin.
    soon = -(-((parse_time(job.facts()["RunTime"]) or 0) + 60) // 60)
    scontrol("update", f"jobid={job.id}", f"TimeLimit={soon}")
    job.wait_until_asked("SIGUSR1")
    scontrol("update", f"jobid={job.id}", "TimeLimit=30")
    gate.open()
    return job, job.wait_for_state("COMPLETED", "FAILED")


def lost_rank(project: Path) -> tuple[Job, int, str, str]:
    """The kernel kills the rank on the second node. Also: the run submitted once more."""
    gate = Gate(project / "lost-rank", 13)
    job = submit(project, "lost-rank", "--time", "30")
    job.wait_for(gate)
    twice = nsphere(project, "submit", "run.toml", "--run", "lost-rank").stderr
    victim = job.ranks()[1]
    os.kill(victim, signal.SIGKILL)
    gate.open()
    return job, victim, twice, job.wait_for_state("COMPLETED", "FAILED")


def own_error(project: Path) -> tuple[Job, str]:
    """One of two ranks cannot write its log; srun then ends the other, which stops as if asked."""
    (project / "own-error" / "log" / "rank-0001.log").mkdir(parents=True)
    job = submit(project, "own-error", "--time", "30")
    return job, job.wait_for_state("COMPLETED", "FAILED")


def seeds(project: Path) -> tuple[list[Path], list[str]]:
    """An array: three seeds, a rank each."""
    options = ("--array", "0-2", "--train.duration=4 steps", "--time", "30")
    job = submit(project, "seeds", *options, nodes=1)
    tasks = [Job(f"{job.id}_{n}", job.run) for n in range(3)]
    states = [task.wait_for_state("COMPLETED", "FAILED") for task in tasks]
    return [job.run / f"seed-{n}" for n in range(3)], states


def unwanted(project: Path) -> tuple[Job, dict, Job, str]:
    """Asked to stop where SLURM may not requeue it; submitted again, and cancelled by its owner."""
    run = project / "unwanted"
    gate, second_gate = Gate(run, 4), Gate(run, 9)
    first = submit(project, "unwanted", "--time", "30", nodes=1)
    scontrol("update", f"jobid={first.id}", "Requeue=0")
    first.wait_for(gate)
    subprocess.run(["scancel", "--batch", "--signal=USR1", first.id], check=True)
    first.wait_until_asked("SIGUSR1")
    gate.open()
    first.wait_for_state("FAILED", "COMPLETED")
    refused = first.facts()
    second = submit(project, "unwanted", "--time", "30", nodes=1)
    second.wait_for(second_gate)
    subprocess.run(["scancel", second.id], check=True)
    second.wait_until_asked("SIGTERM")
    second_gate.open()
    second.wait_for_state("CANCELLED", "FAILED", "COMPLETED")
    time.sleep(3)  # a script that asked for its job to be queued again would have done so
    return first, refused, second, second.facts()["JobState"]


def torchrun_in_srun(project: Path) -> tuple[subprocess.CompletedProcess, Path]:
    """srun starts an agent on each node, and each agent a rank: both kinds of variables are set."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    done = subprocess.run(
        [
            *("srun", "--partition=beside", "--nodes=2", "--ntasks-per-node=1", "--time=30"),
            *(sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"),
            *("--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=srun"),
            *("--local-addr=127.0.0.1", "-m", "launch.cli", "train", "run.toml"),
            *("--run-dir", "torchrun-in-srun", "--train.duration=2 steps"),
        ],
        cwd=project,
        env={**_clean_environment(), "PYTHONSAFEPATH": "1"},
        capture_output=True,
        text=True,
    )
    return done, project / "torchrun-in-srun"


def shell_of_salloc(project: Path) -> subprocess.CompletedProcess:
    """The command as a user types it who has forgotten srun."""
    train = [sys.executable, "-P", "-m", "launch.cli", "train", "run.toml", "--run", "shell"]
    return subprocess.run(
        ["salloc", "--partition=beside", "--nodes=2", "--time=5", *train],
        cwd=project,
        env=_clean_environment(),
        capture_output=True,
        text=True,
    )


def refused(project: Path) -> tuple[list[tuple[str, subprocess.CompletedProcess]], str]:
    """What submit says itself, and what only SLURM knows. Also: the jobs that SLURM knows."""
    tried = [
        (said, nsphere(project, "submit", "run.toml", "--run", "refused", *wrong))
        for wrong, said in (
            (["--optim.lrr=1"], "unknown key optim.lrr"),
            (["--data.shards=x/nowhere.tar"], "nowhere.tar"),
            (["--partition", "nowhere"], "invalid partition specified: nowhere"),
        )
    ]
    known = subprocess.run(["scontrol", "show", "jobs"], capture_output=True, text=True).stdout
    return tried, known


_OF_THE_REST = (
    lost_rank,
    own_error,
    seeds,
    unwanted,
    torchrun_in_srun,
    shell_of_salloc,
    refused,
)


@pytest.fixture(scope="module")
def stories(cluster, project) -> Iterator[dict[str, Future]]:
    """Every case, under way."""
    with ThreadPoolExecutor(11) as pool:
        futures: dict[str, Future] = {}

        def begin_the_rest() -> None:  # before, the clock of the time limit runs
            for story in _OF_THE_REST:
                futures[story.__name__] = pool.submit(story, project)

        begun: Future = Future()
        futures["out_of_time"] = pool.submit(out_of_time, project, lambda: begun.set_result(None))
        futures["preempted"] = pool.submit(preempted, project)
        futures["out_of_time"].add_done_callback(lambda _: begun.done() or begun.set_result(None))
        begun.result()
        begin_the_rest()
        for num_ranks in (4, 2):
            futures[f"undisturbed-{num_ranks}"] = pool.submit(undisturbed, project, num_ranks)
        yield futures


def check_same(run: Path, stories: dict[str, Future], num_ranks: int) -> None:
    whole = stories[f"undisturbed-{num_ranks}"].result()
    losses = read_losses(run)
    assert sorted(losses) == list(range(1, STEPS + 1))
    assert losses == read_losses(whole), "losses are not bit-identical"
    assert read_samples(run) == read_samples(whole)


def test_a_preempted_job_is_queued_again_and_ends_as_if_nothing_had_been(stories):
    job, waiting, state = stories["preempted"].result()
    assert state == "COMPLETED", job.log()
    assert job.facts()["Restarts"] == "1"
    assert [event["why"] for event in job.events("requeue")] == ["preempted"]
    assert [event["how"] for event in job.events("end")] == ["stopped", "done"]
    assert waiting["state"] == "queued" and waiting["queue"]["restarts"] == 1
    assert waiting["checkpoint"]["step"] == waiting["step"] in (5, 6)
    first, second = job.events("start")
    assert (first["from_step"], second["from_step"]) == (0, waiting["step"])
    check_same(job.run, stories, 4)


def test_a_job_out_of_time_is_queued_again_and_ends_as_if_nothing_had_been(stories):
    job, state = stories["out_of_time"].result()
    assert state == "COMPLETED", job.log()
    assert job.facts()["Restarts"] == "1"
    assert [event["why"] for event in job.events("requeue")] == ["time limit near"]
    assert [event["how"] for event in job.events("end")] == ["stopped", "done"]
    check_same(job.run, stories, 4)


def test_a_killed_rank_is_started_again_in_the_same_allocation(stories):
    job, victim, twice, state = stories["lost_rank"].result()
    assert state == "COMPLETED", job.log()
    assert f"its job {job.id} is RUNNING: wait for it, scancel {job.id}" in twice
    assert job.facts()["Restarts"] == "0"
    (restart,) = job.events("restart")
    assert restart["code"] == 128 + signal.SIGKILL and "killed by signal 9" in restart["why"]
    assert f"nsphere: restart ({restart['why']})" in job.log()
    assert not Path(f"/proc/{victim}").exists()
    first, second = job.events("start")
    assert first["job"] == second["job"] == job.id and second["from_step"] >= 10
    check_same(job.run, stories, 2)
    status = read_status(job.run)
    assert (status["state"], status["restarts"], status["step"]) == ("done", 1, STEPS)


def test_a_job_fails_by_its_own_error_and_is_not_queued_again(stories):
    job, state = stories["own_error"].result()
    facts = job.facts()
    assert (state, facts["ExitCode"], facts["Restarts"]) == ("FAILED", "1:0", "0"), job.log()
    assert not job.events("restart") and not job.events("requeue")
    assert "nsphere: fail (rank 1 on " in job.log()
    status = read_status(job.run)
    assert status["state"] == "failed" and status["error"]


def test_an_array_trains_a_run_for_each_seed(stories):
    runs, states = stories["seeds"].result()
    assert states == ["COMPLETED"] * 3
    assert [load_config(run / "config.toml").train.seed for run in runs] == [0, 1, 2]
    losses = [read_losses(run) for run in runs]
    assert all(sorted(found) == [1, 2, 3, 4] for found in losses)
    assert len({found[4] for found in losses}) == 3, "seeds that change nothing"
    assert [read_status(run)["state"] for run in runs] == ["done"] * 3


def test_a_job_that_may_not_be_queued_again_says_so_and_a_cancelled_one_stays_so(stories):
    first, refused, second, state = stories["unwanted"].result()
    assert (refused["JobState"], refused["ExitCode"]) == ("FAILED", "85:0"), first.log()
    assert f"SLURM refused to queue job {first.id} again; the run goes on with: sbatch" in (
        first.log()
    )
    assert state == "CANCELLED", second.log()
    assert [event["how"] for event in second.events("end")] == ["stopped", "stopped"]
    saved = [event["step"] for event in second.events("end")]
    assert saved[0] in (4, 5) and saved[1] in (9, 10)
    assert second.events("start")[1]["from_step"] == saved[0]


def test_torchrun_inside_srun_counts_and_a_shell_without_srun_is_told(stories):
    done, run = stories["torchrun_in_srun"].result()
    assert done.returncode == 0, done.stderr
    (start,) = [event for event in read_events(run) if event["event"] == "start"]
    assert start["world_size"] == 2 and sorted(read_losses(run)) == [1, 2]
    told = stories["shell_of_salloc"].result()
    said = [line for line in told.stderr.splitlines() if line.startswith("nsphere: ")]
    assert told.returncode == 2 and len(said) == 1, told.stderr
    assert "with 2 nodes, and one process would train here alone" in said[0]


def test_bad_input_never_reaches_the_queue(stories):
    tried, known = stories["refused"].result()
    for said, done in tried:
        assert done.returncode == 2 and said in done.stderr, done.stderr
    assert "JobName=refused" not in known
