"""`nsphere estimate`: what a run will need, before it is started."""

import json
import os
from pathlib import Path
from typing import Annotated

import typer

from launch.data_commands import join_overrides

OVERRIDES = {"allow_extra_args": True, "ignore_unknown_options": True}


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(context_settings=OVERRIDES)(estimate)


def estimate(
    context: typer.Context,
    config: Annotated[Path, typer.Argument(help="TOML file, see configs/.")],
    nodes: Annotated[int, typer.Option(help="Nodes.", min=1)] = 1,
    gpus_per_node: Annotated[int, typer.Option(help="GPUs of a node, one rank each.", min=1)] = 8,
    gpu: Annotated[
        str, typer.Option(help="b200, h200, h100, a100, a100-40, v100, l40s, ..., or cpu.")
    ] = "h100",
    ranks_per_node: Annotated[
        int, typer.Option(help="With --gpu cpu: ranks of a node.", min=1)
    ] = 1,
    samples: Annotated[
        int, typer.Option(help="Samples of an epoch; 0: what the shards' indexes say.", min=0)
    ] = 0,
    classes: Annotated[
        int,
        typer.Option(
            help="Class centers or labels; 0: as configured, or the label table's.", min=0
        ),
    ] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """What a run needs: memory of a rank by term, bytes sent, time, cost, disk; and if it fits.

    Reads no shard and starts no rank. Any key: --section.key=value. The exit code is 0 where it
    fits and 1 where it does not.

    Example: nsphere estimate configs/cosface_webface42m_r100.toml --nodes 4 --gpus-per-node 8
    --gpu h100 --classes 2059906 --samples 42474558
    """
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # no GPU is asked what it is
    from trainer.config import load_config
    from trainer.estimate import estimate as work_out
    from trainer.estimate import plan_run
    from trainer.estimate.machines import find_gpu, this_processor
    from trainer.estimate.report import describe, values

    resolved = load_config(config, join_overrides(context.args))
    ranks = ranks_per_node if gpu == "cpu" else gpus_per_node
    machine = this_processor(ranks) if gpu == "cpu" else find_gpu(gpu)
    plan = plan_run(
        resolved, machine, nodes=nodes, ranks_per_node=ranks, samples=samples, classes=classes
    )
    found = work_out(plan)
    typer.echo(json.dumps(values(found)) if as_json else describe(found))
    raise typer.Exit(0 if found.fits else 1)
