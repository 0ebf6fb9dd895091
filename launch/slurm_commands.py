"""`nsphere submit` and `nsphere status`: a run's way through SLURM."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from launch.data_commands import join_overrides

if TYPE_CHECKING:
    from launch.slurm import Task
    from trainer.config import Config


def register(app: typer.Typer) -> None:
    """Add the commands of this module to the console script."""
    options = {"allow_extra_args": True, "ignore_unknown_options": True}
    app.command("submit", context_settings=options)(submit)
    app.command("status")(status)


def submit(  # noqa: PLR0913 - a command's options
    context: typer.Context,
    config: Annotated[Path, typer.Argument(help="TOML file, see configs/.")],
    nodes: Annotated[int, typer.Option(help="Nodes.", min=1)] = 1,
    gpus_per_node: Annotated[int, typer.Option(help="GPUs, a rank each; 0: CPU.", min=0)] = 0,
    ranks_per_node: Annotated[int, typer.Option(help="0: one a GPU, or one.", min=0)] = 0,
    cpus_per_task: Annotated[int, typer.Option(help="CPU cores of a rank.", min=0)] = 0,
    time: Annotated[str, typer.Option(help="Limit of one stay; the run goes on after it.")] = "",
    partition: Annotated[str, typer.Option(help="SLURM's partition.")] = "",
    account: Annotated[str, typer.Option(help="SLURM's account.")] = "",
    qos: Annotated[str, typer.Option(help="SLURM's quality of service.")] = "",
    array: Annotated[str, typer.Option(help="0-2: seeds 0 to 2; with --sweep: which tasks.")] = "",
    sweep: Annotated[
        list[str] | None, typer.Option(help="KEY=VALUE,VALUE; all combinations.")
    ] = None,
    name: Annotated[str, typer.Option(help="Of the job; default: the run folder's.")] = "",
    run: Annotated[
        Path | None, typer.Option("--run", "--run-dir", help="Run folder; default runs/NAME.")
    ] = None,
    signal_before: Annotated[
        int | None, typer.Option(help="Seconds before the limit to save and stop at.", min=1)
    ] = None,
    sbatch_option: Annotated[
        list[str] | None, typer.Option(help='Any other, e.g. "--constraint=h100".')
    ] = None,
    template: Annotated[Path | None, typer.Option(help="Batch script; slurm/train.sbatch.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Write and show; no SLURM.")] = False,
) -> None:
    """Check a run, write RUN/job.sbatch, submit it. It is queued again until it is done.

    Example: nsphere submit configs/cosface_webface42m_r100.toml --nodes 4 --gpus-per-node 8
    --time 24:00:00 --run runs/faces

    Seeds: --array 0-2. A sweep: --sweep train.seed=0,1 --sweep optim.lr=1e-3,3e-4. Each task has a
    run folder of its own in --run.
    """
    from launch import slurm
    from trainer.events import record_event

    folder = (run or Path("runs") / config.stem).absolute()
    overrides = join_overrides(context.args)
    tasks, array = slurm.plan_tasks(folder, array, sweep or [])
    request = slurm.Request(
        nodes=nodes,
        ranks_per_node=ranks_per_node or gpus_per_node or 1,
        gpus_per_node=gpus_per_node,
        cpus_per_task=cpus_per_task,
        time=time,
        partition=partition,
        account=account,
        qos=qos,
        name=name or folder.name,
        signal_before_s=signal_before,
        array=array,
        others=tuple(sbatch_option or []),
    )
    found = slurm.find_template(template)
    slurm.check_free(tasks)
    checked = _check(config, overrides, tasks, request.world_size)
    command = ["train", str(config.absolute()), *overrides]
    text = slurm.fill_template(
        found, request, tasks, command, max_restarts=checked.launch.max_restarts
    )
    script = slurm.write_script(folder, text)
    if dry_run:
        typer.echo(text, nl=False)
        sys.stderr.write(f"{script} is written and not submitted\n")
        return
    job = slurm.submit(script)
    for task in tasks:
        own = f"{job}_{task.number}" if array else job
        task.run.mkdir(parents=True, exist_ok=True)
        log = folder / "log" / f"slurm-{own}.out"
        record_event(task.run, "submit", {"job": own, "script": str(script), "log": str(log)})
    _say_how_to_follow(job, folder, is_array=bool(array))


def _check(
    config_path: Path, overrides: list[str], tasks: list["Task"], world_size: int
) -> "Config":
    """What can be checked before the queue, as `nsphere train` does it; the first config."""
    from launch.runs import check_run
    from trainer.config import load_config

    configs = [load_config(config_path, [*overrides, *task.overrides]) for task in tasks]
    for task, config in zip(tasks, configs, strict=True):
        check_run(config, task.run, resume=True, num_ranks=world_size)
    return configs[0]


def _say_how_to_follow(job: str, folder: Path, *, is_array: bool) -> None:
    log = folder / "log" / (f"slurm-{job}_*.out" if is_array else f"slurm-{job}.out")
    typer.echo(
        f"job {job}\n"
        f"nsphere status {folder}\n"
        f"squeue -j {job}\n"
        f"tail -F {log}\n"
        f"scancel {job}        # saves and stops; submit again to go on"
    )


def status(
    runs: Annotated[list[Path], typer.Argument(help="Run folders, or one with runs in it.")],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON list.")] = False,
) -> None:
    """Show where runs are: queue, step, speed, ETA, checkpoint, restarts and why, last error.

    Example: nsphere status runs/faces runs/seeds
    """
    from launch.status import describe, find_runs, read_status

    found: list[dict[str, Any]] = [read_status(run) for run in find_runs(runs)]
    if as_json:
        typer.echo(json.dumps(found))
        return
    typer.echo("\n\n".join(describe(facts) for facts in found))
