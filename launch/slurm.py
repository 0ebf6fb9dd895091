"""A configuration and a request for nodes -> the exact text that sbatch gets; submit it.

`slurm/train.sbatch` is the template, which a site edits; `Request.options` and `job_lines` fill it.
"""

import itertools
import math
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.job import ask_slurm, parse_time
from launch.ranks import LaunchError
from trainer.events import read_events

SCRIPT = "job.sbatch"
TEMPLATE = Path("slurm") / "train.sbatch"
SIGNAL_BEFORE_S = 300  # SLURM may send it up to a minute early; a save of a large model takes some
_MARKS = ("@options@", "@job@")
MOST_TASKS = 10_000  # each has a line in the script; SLURM takes 1,001 unless a site allows more


@dataclass(frozen=True)
class Request:
    """What is asked of SLURM."""

    nodes: int = 1
    ranks_per_node: int = 1
    gpus_per_node: int = 0
    cpus_per_task: int = 0  # 0: the partition's default
    time: str = ""
    partition: str = ""
    account: str = ""
    qos: str = ""
    name: str = "nsphere"
    signal_before_s: int | None = None  # None: by the time limit
    array: str = ""
    others: tuple[str, ...] = ()  # further options, as sbatch takes them

    def __post_init__(self) -> None:
        if self.ranks_per_node > self.gpus_per_node > 0:
            raise LaunchError(
                f"--ranks-per-node={self.ranks_per_node} with --gpus-per-node="
                f"{self.gpus_per_node}: a rank needs a GPU of its own"
            )
        wrong = next((option for option in self.others if not option.startswith("-")), None)
        if wrong is not None:
            raise LaunchError(
                f"--sbatch-option={wrong}: write it as sbatch takes it, with its dashes: "
                f"--sbatch-option=--{wrong}"
            )
        limit = self._limit_s()
        if limit is not None and self.signal_s >= limit:
            raise LaunchError(
                f"--signal-before={self.signal_s} s leaves nothing of --time={self.time} ({limit} "
                "s) to train in: give more time, or a smaller --signal-before"
            )

    @property
    def world_size(self) -> int:
        """Ranks of the job."""
        return self.nodes * self.ranks_per_node

    @property
    def signal_s(self) -> int:
        """Seconds before the time limit at which the run is told to save and stop."""
        if self.signal_before_s is not None:
            return self.signal_before_s
        limit = self._limit_s()
        return SIGNAL_BEFORE_S if limit is None else min(SIGNAL_BEFORE_S, limit // 4)

    def _limit_s(self) -> int | None:
        if not self.time or self.time.lower() in ("0", "infinite", "unlimited"):
            return None
        limit = parse_time(self.time)
        if not limit:
            raise LaunchError(
                f"--time={self.time}: write MINUTES, HOURS:MINUTES:SECONDS or DAYS-HOURS"
            )
        return limit

    def options(self, log: Path) -> list[str]:
        """The `#SBATCH` lines; output goes to `log`, which may hold sbatch's %j, %A and %a."""
        given = {
            "job-name": self.name,
            "nodes": self.nodes,
            "ntasks-per-node": self.ranks_per_node,
            "gpus-per-node": self.gpus_per_node,
            "cpus-per-task": self.cpus_per_task,
            "time": self.time,
            "partition": self.partition,
            "account": self.account,
            "qos": self.qos,
            "array": self.array,
            "signal": f"B:USR1@{self.signal_s}",
            "output": log,
        }
        lines = [f"--{name}={_quoted(str(value))}" for name, value in given.items() if value]
        lines += ["--requeue", "--open-mode=append", *self.others]
        return [f"#SBATCH {line}" for line in lines]


@dataclass(frozen=True)
class Task:
    """One run of the job: its folder and what is its own among the overrides."""

    number: int
    run: Path
    overrides: tuple[str, ...] = ()


def plan_tasks(run: Path, array: str, sweeps: Sequence[str]) -> tuple[list[Task], str]:
    """The runs of a job, and the text for `--array`; one task and "" where there is no array.

    `array` alone: task N is train.seed = N. `sweeps`, "KEY=V1,V2,...": every combination of the
    values, counted from 0, the last key fastest; `array` then picks some of them. Each task has a
    folder of its own in `run`.
    """
    if not array and not sweeps:
        return [Task(0, run)], ""
    if not sweeps:
        numbers, limit = parse_array(array)
        own: dict[int, tuple[str, ...]] = {n: (f"--train.seed={n}",) for n in numbers}
    else:
        axes = [_parse_sweep(sweep) for sweep in sweeps]
        if math.prod(map(len, axes)) > MOST_TASKS:
            raise LaunchError(
                f"--sweep: {math.prod(map(len, axes)):,} combinations, more than {MOST_TASKS:,}: "
                "sweep fewer values at once"
            )
        own = dict(enumerate(itertools.product(*axes)))
        numbers, limit = parse_array(array) if array else (list(own), "")
        missing = [number for number in numbers if number not in own]
        if missing:
            raise LaunchError(
                f"--array={array}: {missing[0]} is none of the sweep's {len(own)} combinations, "
                f"0 to {len(own) - 1}"
            )
    tasks = [Task(number, run / _folder_name(own[number]), own[number]) for number in numbers]
    if len({task.run for task in tasks}) < len(tasks):
        raise LaunchError("two tasks of the array are the same: a --sweep names a value twice")
    return tasks, array or f"0-{len(own) - 1}" + limit


def parse_array(text: str) -> tuple[list[int], str]:
    """sbatch's `0-5`, `0,2,7`, `0-8:2`, perhaps with `%AT_ONCE`: the numbers, and the last part."""
    words, percent, most = text.partition("%")
    numbers: list[int] = []
    for word in words.split(","):
        match = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9})(?::(\d{1,9}))?)?", word)
        if match is None or (percent and not most.isdigit()):
            raise LaunchError(f"--array={text}: write 0-2, 0,3,5 or 0-8:2, and %N for N at once")
        first, last, every = match.groups()
        more = range(int(first), int(last or first) + 1, int(every or 1) or 1)
        if len(numbers) + len(more) > MOST_TASKS:
            raise LaunchError(f"--array={text}: more than {MOST_TASKS:,} tasks: submit it in parts")
        numbers += more
    if len(set(numbers)) < len(numbers) or not numbers:
        raise LaunchError(f"--array={text}: names a task twice, or none")
    return numbers, percent + most


def _parse_sweep(text: str) -> list[str]:
    """ "optim.lr=1e-3,3e-4" -> its overrides; commas inside brackets and quotes divide nothing."""
    key, equals, values = text.removeprefix("--").partition("=")
    found = re.findall(r"(?:\[[^\]]*\]|\"[^\"]*\"|'[^']*'|[^,])+", values)
    if not equals or "." not in key or not found:
        raise LaunchError(f"--sweep {text}: write --sweep section.key=VALUE,VALUE")
    return [f"--{key}={value.strip()}" for value in found]


def _folder_name(overrides: Sequence[str]) -> str:
    names = []
    for override in overrides:
        key, _, value = override.removeprefix("--").partition("=")
        plain = re.sub(r"[^A-Za-z0-9_.+-]+", "-", value).strip("-")
        names.append(f"{key.rpartition('.')[2]}-{plain}")
    return "_".join(names)


def find_template(given: Path | None) -> Path:
    """The template named, else ./slurm/train.sbatch, else the one beside the package."""
    places = [given] if given else [TEMPLATE, Path(__file__).parents[1] / TEMPLATE]
    for place in places:
        if place.is_file():
            return place.absolute()
    named = " or ".join(str(place) for place in places)
    raise LaunchError(f"no batch template at {named}: give --template FILE, a slurm/train.sbatch")


def fill_template(
    template: Path, request: Request, tasks: list[Task], command: list[str], *, max_restarts: int
) -> str:
    """The batch script: `template` with what `request` asks for and `tasks` are.

    `command`: words of `nsphere train` without the run folder and without a task's own overrides.
    """
    text = template.read_text()
    for mark in _MARKS:
        if sum(line.strip() == mark for line in text.splitlines()) != 1:
            raise LaunchError(
                f"{template}: has no line {mark}, or two: nsphere fills in {' and '.join(_MARKS)}"
            )
    folder = tasks[0].run.parent if request.array else tasks[0].run
    log = Path(str(folder).replace("%", "%%"), "log")  # for sbatch a % begins a pattern
    log /= "slurm-%A_%a.out" if request.array else "slurm-%j.out"
    filled = {
        "@options@": request.options(log),
        "@job@": _job_lines(folder, tasks, command, max_restarts, is_array=bool(request.array)),
    }
    lines = []
    for line in text.splitlines():
        lines += filled.get(line.strip(), [line])
    return "\n".join(lines) + "\n"


def _job_lines(
    folder: Path, tasks: list[Task], command: list[str], max_restarts: int, *, is_array: bool
) -> list[str]:
    lines = [
        f"cd {shlex.quote(str(Path.cwd()))} || exit 2",
        f"python=${{python:-{shlex.quote(sys.executable)}}}",
        f"script={shlex.quote(str(folder / SCRIPT))}",
        f"max_restarts={max_restarts}",
    ]
    own = [f"run={shlex.quote(str(task.run))} own=({shlex.join(task.overrides)})" for task in tasks]
    if is_array:
        lines.append("case $SLURM_ARRAY_TASK_ID in")
        lines += [f"{task.number}) {line} ;;" for task, line in zip(tasks, own, strict=True)]
        lines += [
            '*) echo "nsphere: no task $SLURM_ARRAY_TASK_ID in this job" >&2; exit 2 ;;',
            "esac",
        ]
    else:
        lines += own
    return [*lines, f'train=({shlex.join(command)} --run-dir "$run" "${{own[@]}}")']


def check_free(tasks: Sequence[Task]) -> None:
    """Raise LaunchError where a run's last job is still in the queue, or runs."""
    for task in tasks:
        jobs = [event["job"] for event in read_events(task.run) if event["event"] == "submit"]
        state = ask_slurm(jobs[-1]).get("JobState", "") if jobs else ""
        if state in ("PENDING", "CONFIGURING", "RUNNING", "SUSPENDED", "COMPLETING"):
            raise LaunchError(
                f"{task.run}: its job {jobs[-1]} is {state}: wait for it, scancel {jobs[-1]}, or "
                "name another --run"
            )


def write_script(folder: Path, text: str) -> Path:
    """FOLDER/job.sbatch; another one that is there is kept as job.1.sbatch, job.2.sbatch, ..."""
    path = folder / SCRIPT
    try:
        (folder / "log").mkdir(parents=True, exist_ok=True)  # sbatch makes no folder for output
        if path.exists() and path.read_text() != text:
            free = next(n for n in itertools.count(1) if not (folder / f"job.{n}.sbatch").exists())
            path.rename(folder / f"job.{free}.sbatch")
        path.write_text(text)
        path.chmod(0o755)
    except OSError as error:
        raise LaunchError(f"{path}: cannot be written: {error}") from None
    return path


def submit(script: Path) -> str:
    """Hand a script to sbatch; the job's id. Raises LaunchError with what SLURM says."""
    try:
        done = subprocess.run(
            ["sbatch", "--parsable", str(script)], capture_output=True, text=True, timeout=120
        )
    except FileNotFoundError:
        raise LaunchError(
            f"there is no sbatch here: submit {script} on a login node of the cluster, or look at "
            "it with --dry-run"
        ) from None
    except subprocess.TimeoutExpired:
        raise LaunchError(f"sbatch {script} does not answer for 120 s: see squeue first") from None
    if done.returncode:
        said = done.stderr.strip() or f"exit code {done.returncode}"
        raise LaunchError(f"SLURM refuses {script}: {said}")
    return done.stdout.strip().partition(";")[0]


def _quoted(text: str) -> str:
    """For a `#SBATCH` line, where white space, quotes, backslashes and # mean something."""
    if not re.search(r"[\s\"'\\#]", text):
        return text
    return '"' + re.sub(r'(["\\])', r"\\\1", text) + '"'
