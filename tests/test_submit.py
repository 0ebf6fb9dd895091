"""`nsphere submit` up to sbatch: the script's exact text, arrays, templates, what is refused."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_runs import MODEL, write_shards

from launch.cli import main
from launch.ranks import LaunchError
from launch.signals import BAD_INPUT
from launch.slurm import Request, parse_array, plan_tasks

TEMPLATE = Path(__file__).parents[1] / "slurm" / "train.sbatch"
TOML = """
[data]
shards = "x/x-{0..2}.tar"
workers = 0
[model]
name = "model.json"
[train]
duration = "4 steps"
global_batch_size = 16
precision = "fp32"
[launch]
max_restarts = 5
"""


@pytest.fixture
def project(tmp_path, monkeypatch) -> Path:
    """A folder with shards, a model and run.toml, on a machine without SLURM."""
    write_shards(tmp_path / "x")
    (tmp_path / "model.json").write_text(json.dumps(MODEL))
    (tmp_path / "run.toml").write_text(TOML)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "/nowhere")
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


@pytest.fixture
def submit(project, monkeypatch, capfd):
    """Calls the command in this process: (exit code, stdout, stderr)."""

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(
            sys, "argv", ["nsphere", "submit", "run.toml", "--run", "r", *arguments]
        )
        with pytest.raises(SystemExit) as ended:
            main()
        return (ended.value.code or 0, *capfd.readouterr())

    return call


@pytest.fixture
def refused(submit):
    """Calls the command, expects exit 2; returns the one line it said."""

    def call(*arguments: str) -> str:
        code, _, err = submit(*arguments)
        said = [line for line in err.splitlines() if line.startswith("nsphere: ")]
        assert code == BAD_INPUT and len(said) == 1, err
        return said[0]

    return call


def words_after(text: str, line: str) -> list[str]:
    """What bash makes of the script's assignments up to `line`, as the words of train=()."""
    script = text[text.index("\ncd ") : text.index(line)]
    printed = subprocess.run(
        ["/bin/bash", "-c", script + '\nprintf "%s\\n" "$run" "${train[@]}"'],
        capture_output=True,
        text=True,
        check=True,
        env={"SLURM_ARRAY_TASK_ID": "1"},
    )
    return printed.stdout.splitlines()


def test_a_dry_run_writes_and_shows_the_exact_script(project, submit):
    code, out, err = submit(
        *("--nodes", "4", "--gpus-per-node", "8", "--cpus-per-task", "6", "--time", "1-00:00:00"),
        *("--partition", "gpu", "--account", "lab", "--qos", "long", "--name", "my run"),
        *("--sbatch-option=--constraint=h100", "--train.global_batch_size=32", "--dry-run"),
        "--data.cache_dir=it's $HOME",
    )
    assert code == 0, err
    script = project / "r" / "job.sbatch"
    assert out == script.read_text() and "not submitted" in err
    assert [line.removeprefix("#SBATCH ") for line in out.splitlines() if "#SBATCH --" in line] == [
        '--job-name="my run"',
        "--nodes=4",
        "--ntasks-per-node=8",
        "--gpus-per-node=8",
        "--cpus-per-task=6",
        "--time=1-00:00:00",
        "--partition=gpu",
        "--account=lab",
        "--qos=long",
        "--signal=B:USR1@300",
        f"--output={project}/r/log/slurm-%j.out",
        "--requeue",
        "--open-mode=append",
        "--constraint=h100",
    ]
    assert words_after(out, "\nexport PYTHONSAFEPATH") == [
        str(project / "r"),
        *("train", str(project / "run.toml"), "--train.global_batch_size=32"),
        *("--data.cache_dir=it's $HOME", "--run-dir", str(project / "r")),
    ]
    assert f"cd {project} || exit 2\n" in out and "max_restarts=5\n" in out
    assert f"python=${{python:-{shlex.quote(sys.executable)}}}" in out
    subprocess.run(["/bin/bash", "-n", script], check=True)


def test_names_that_mean_something_to_sbatch_reach_it_whole(project, submit):
    """sbatch reads its lines as a shell does: quotes, backslashes, # for a comment; % in output."""
    folder = project / """it's "50%u" #1 \\ x"""
    code, out, err = submit("--run", str(folder), "--name=a 'b' #c", "--dry-run")
    assert code == 0, err
    lines = [line.removeprefix("#SBATCH ") for line in out.splitlines() if "#SBATCH --" in line]
    words = dict(shlex.split(line, comments=True)[0].partition("=")[::2] for line in lines)
    assert all(len(shlex.split(line, comments=True)) == 1 for line in lines)
    assert words["--job-name"] == "a 'b' #c"
    assert words["--output"] == str(folder).replace("%", "%%") + "/log/slurm-%j.out"
    assert words_after(out, "\nexport PYTHONSAFEPATH")[0] == str(folder)


def test_older_scripts_are_kept(project, submit):
    for time in ("10", "10", "20", "30"):
        assert submit("--time", time, "--dry-run")[0] == 0
    found = {path.name: path.read_text() for path in (project / "r").glob("*.sbatch")}
    assert sorted(found) == ["job.1.sbatch", "job.2.sbatch", "job.sbatch"]
    assert "--time=10\n" in found["job.1.sbatch"] and "--time=30\n" in found["job.sbatch"]


def test_a_site_edits_the_template(project, submit, refused):
    site = TEMPLATE.read_text().replace("# module load cuda/12.4", "module load cuda/99")
    (project / "slurm").mkdir()
    (project / "slurm" / "train.sbatch").write_text(site)
    assert "\nmodule load cuda/99\n" in submit("--dry-run")[1]
    (project / "mine.sbatch").write_text(site.replace("cuda/99", "cuda/100"))
    assert "cuda/100" in submit("--dry-run", "--template", "mine.sbatch")[1]
    assert "no batch template at nowhere" in refused("--template", "nowhere", "--dry-run")
    (project / "mine.sbatch").write_text("srun nsphere")
    assert "mine.sbatch: has no line @options@" in refused("--template=mine.sbatch", "--dry-run")


def test_an_array_gives_each_task_a_folder_and_its_overrides(project, submit):
    code, out, err = submit("--array", "0-2%1", "--dry-run")
    assert code == 0, err
    assert "#SBATCH --array=0-2%1\n" in out and "slurm-%A_%a.out" in out
    run, *words = words_after(out, "\nexport PYTHONSAFEPATH")
    assert run == f"{project}/r/seed-1" and words[-3:] == ["--run-dir", run, "--train.seed=1"]
    code, out, err = submit(
        *("--sweep", "optim.lr=1e-3,3e-4", "--sweep", "optim.betas=[0.9,0.98],[0.9,0.95]"),
        "--dry-run",
    )
    assert code == 0 and "#SBATCH --array=0-3\n" in out, err
    run, *words = words_after(out, "\nexport PYTHONSAFEPATH")
    assert words[-2:] == ["--optim.lr=1e-3", "--optim.betas=[0.9,0.95]"]
    assert run == f"{project}/r/lr-1e-3_betas-0.9-0.95"


def test_plans_of_arrays():
    run = Path("r")
    assert parse_array("0-2") == ([0, 1, 2], "")
    assert parse_array("1,3-7:2%4") == ([1, 3, 5, 7], "%4")
    tasks, array = plan_tasks(run, "2", ["a.b=1,2,3"])
    assert array == "2" and [task.overrides for task in tasks] == [("--a.b=3",)]
    for array, sweeps, said in (
        ("x", [], "--array=x: write 0-2"),
        ("1,1", [], "names a task twice"),
        ("0-999999999", [], "more than 10,000 tasks: submit it in parts"),
        ("", [f"a.{key}=" + ",".join("0123456789") for key in "bcdef"], "100,000 combinations"),
        ("3", ["a.b=1,2"], "3 is none of the sweep's 2 combinations, 0 to 1"),
        ("", ["lr=1"], "--sweep lr=1: write --sweep section.key=VALUE,VALUE"),
        ("", ["a.b="], "write --sweep section.key"),
        ("", ["a.b=1,1"], "names a value twice"),
    ):
        with pytest.raises(LaunchError, match=said):
            plan_tasks(run, array, sweeps)


def test_the_signal_comes_in_good_time():
    assert Request().signal_s == 300
    assert Request(time="24:00:00").signal_s == 300
    assert Request(time="10").signal_s == 150
    assert Request(time="10", signal_before_s=20).signal_s == 20
    with pytest.raises(LaunchError, match="--signal-before=60 s leaves nothing of --time=1"):
        Request(time="1", signal_before_s=60)


BAD = {
    "unknown key": (["--optim.lrr=1"], "unknown key optim.lrr; nearest: optim.lr"),
    "a task's value": (["--sweep", "optim.lr=1e-3,fast"], "optim.lr"),
    "shards": (["--data.shards=x/x-9.tar"], "x-9.tar"),
    "ranks": (["--nodes", "3", "--ranks-per-node", "8"], "24 ranks for train.global_batch_size"),
    "time": (["--time", "soon"], "--time=soon: write MINUTES"),
    "GPUs": (["--gpus-per-node", "2", "--ranks-per-node", "4"], "a rank needs a GPU of its own"),
    "an option": (["--sbatch-option=mem=4G"], "write it as sbatch takes it, with its dashes"),
    "no SLURM": ([], "there is no sbatch here"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_clear_line_and_nothing_is_submitted(project, refused, case):
    arguments, said = BAD[case]
    assert said in refused(*arguments)
    assert (project / "r" / "job.sbatch").exists() == (case == "no SLURM")
